"""The answer for one image, and the answers that are kept for images that come again."""

import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionloop.data.encoded import Size
from visionloop.predictor import FloatArray, Predictor
from visionloop.records import Prediction

ENTRY_BYTES, CLASS_BYTES = 1000, 120  # about what an answer takes in memory, without its embedding, and each class


@dataclass(frozen=True)
class Timing:
    """Where the time for an image went. `is_cached`: an answer from before, so none went anywhere."""

    queue_s: float = 0.0
    decode_s: float = 0.0
    network_s: float = 0.0
    is_cached: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer(Prediction):
    """The answer for one image, with the embedding (d,) that it was made from, and what the log wants to know.

    `sha256` is that of the image's bytes, `size` its width and height as it is shown. `distance` is None where the card
    has no rule for it, `quality` where nobody measured.
    """

    sha256: str
    embedding_d: FloatArray
    size: Size
    distance: float | None = None
    quality: Mapping[str, float] | None = None
    timing: Timing = Timing()


class AnswerCache:
    """Answers of one model by the sha256 of the image's bytes, as many as fit; what was not asked for longest goes.

    The whole answer is kept, whatever of it was asked for. A swap empties the cache. 0 bytes: it keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._answers: OrderedDict[str, tuple[Answer, int]] = OrderedDict()
        self._predictor: weakref.ref[Predictor] | None = None

    def __len__(self) -> int:
        return len(self._answers)

    def find(self, predictor: Predictor, sha256: str) -> Answer | None:
        """Return the answer of this model. Call it with the current model only: it empties what another one kept."""
        if self._predictor is None or self._predictor() is not predictor:
            self._predictor, self._num_bytes = weakref.ref(predictor), 0
            self._answers.clear()
        found = self._answers.get(sha256)
        if found is None:
            return None
        self._answers.move_to_end(sha256)
        return replace(found[0], timing=Timing(is_cached=True))

    def keep(self, predictor: Predictor, answer: Answer) -> None:
        """Keep an answer; not that of a model that was swapped out meanwhile."""
        is_current = self._predictor is not None and self._predictor() is predictor
        if not self._max_bytes or not is_current or answer.sha256 in self._answers:
            return
        size = ENTRY_BYTES + CLASS_BYTES * len(answer.probabilities) + answer.embedding_d.nbytes
        self._answers[answer.sha256] = answer, size
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._answers.popitem(last=False)[1][1]
