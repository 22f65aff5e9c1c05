"""Whether a bundle gives the same answers on every engine that may serve it: a runtime, and the precision of its graph.

`train` asks it of images that the network has not learned from, without their labels, and the card lists the engines
whose share of other answers has an upper 95 % bound within `train.export.most_changed` (Clopper & Pearson 1934). That
needs independent images: one of each group counts. Images of the training side would flatter: there a network is surer.

    299 images, none answered otherwise: at most 1 %. 473 with one, 628 with two.

`evaluate` asks what it costs on the test side, with labels: log loss may rise by MOST_RISE. The card cannot know that:
it is sealed before a label of the test side is seen. A promotion's ledger entry keeps which engines passed both.
"""

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.bundle import hash_file
from visionloop.data.images import UInt8Array
from visionloop.data.shards import IntArray, Prepared
from visionloop.errors import BundleError
from visionloop.evaluation.calibration import make_targets
from visionloop.evaluation.label_metrics import compute_label_losses
from visionloop.evaluation.metrics import compute_log_losses
from visionloop.evaluation.promises import bound_errors, count_flawless
from visionloop.networks.processor import describe_machine, has_bf16
from visionloop.predictor import ENGINES, FP32, FloatArray, Keep, Outputs, Predictor, has_openvino
from visionloop.workfolder import write_through

MOST_DIFFERENCE = 0.02  # of a probability, in fp32
MOST_CHANGED = 0.002  # of the answers, in fp32
MOST_RISE = 0.01  # of log loss
DELTA = 0.05
MOST_KEPT_BYTES = 64 << 20  # of what one engine gave: 12,000 images at 1,280 numbers each


@dataclass
class RuntimeCheck:
    """One engine beside ONNX Runtime fp32: the largest difference of a probability, and the answers that differ.

    `cosine` is the least between embeddings. `rise` is that of log loss, `class_rise` by class, where labels are known.
    """

    name: str
    predictor: Predictor | None
    difference: float = 0.0
    num_changed: int = 0
    num_doubted: int = 0  # of these: the same class, but one of the two says "don't know"
    num_images: int = 0
    cosine: float = 1.0
    rise: float | None = None
    class_rise: dict[str, float] = field(default_factory=dict)

    @property
    def is_approved(self) -> bool:
        """Whether it loads, costs no log loss, and in fp32 gives next to the same probabilities."""
        close = self.difference <= MOST_DIFFERENCE and self.num_changed <= MOST_CHANGED * self.num_images
        is_close = close or not self.name.endswith(" fp32")
        return self.predictor is not None and is_close and (self.rise is None or self.rise <= MOST_RISE)

    @property
    def most_changed(self) -> float:
        """The upper 95 % bound of the share of other answers."""
        return bound_errors(self.num_changed, self.num_images, DELTA)

    def compare(self, images_nhwc: UInt8Array, ours: Outputs, reference: Predictor) -> list[FloatArray]:
        """Run some images, compare the answers with those of ONNX Runtime in fp32; return the probabilities (n, k).

        "Don't know" is an answer too. Of an engine that does not load there is nothing to return.
        """
        if self.predictor is None:
            return []
        theirs = self.predictor.run(images_nhwc)
        distance_nk = np.abs(theirs.probs_nk - ours.probs_nk)
        differs_n = reference.choose(theirs.probs_nk) != reference.choose(ours.probs_nk)
        differs_n = differs_n.any(axis=1) if differs_n.ndim == 2 else differs_n
        self.difference = max(self.difference, float(np.nan_to_num(distance_nk, nan=1.0).max(initial=0.0)))
        doubted_n = ~differs_n & (theirs.abstained_n != ours.abstained_n)
        self.num_changed += int((differs_n | doubted_n).sum())
        self.num_doubted += int(doubted_n.sum())
        self.num_images += len(images_nhwc)
        self.cosine = min(self.cosine, _compute_cosine(theirs.embedding_nd, ours.embedding_nd))
        return [theirs.probs_nk]

    def judge(self, probs_nk: FloatArray, ours_nk: FloatArray, truth: NDArray[Any], classes: Sequence[str]) -> None:
        """Note how much higher log loss is than in ONNX Runtime fp32, in all and for the images of each class."""
        rise_n = _compute_losses(truth, probs_nk) - _compute_losses(truth, ours_nk)
        rise_n = np.nan_to_num(rise_n, nan=np.inf)
        targets_nk = make_targets(truth, len(classes)) > 0
        self.rise = float(rise_n.mean())
        self.class_rise = {
            n: float(rise_n[of_n].mean()) for n, of_n in zip(classes, targets_nk.T, strict=True) if of_n.any()
        }

    def to_json(self) -> dict[str, object]:
        """Return the result. The difference has one digit: its last ones are those of the machine."""
        rise = {} if self.rise is None else {"log_loss_rise": _round(self.rise)}
        return {
            "runtime": self.name,
            "approved": self.is_approved,
            "loads": self.predictor is not None,
            "largest_difference": float(f"{self.difference:.0e}"),
            "num_changed": self.num_changed,
            **rise,
        }


def list_engines(*, with_int8: bool) -> list[str]:
    """Return the engines of this machine beside ONNX Runtime in fp32."""
    names = [name for name in ENGINES if name != FP32 and (with_int8 or not name.endswith("int8"))]
    has = {"openvino": has_openvino(), "onnxruntime": True}
    return [name for name in names if has[name.partition(" ")[0]] and (has_bf16() or not name.endswith("bf16"))]


def open_runtimes(predictor: Predictor, keep: Keep | None = None) -> list[RuntimeCheck]:
    """Open the engines of this machine that the card approves of; no other is ever served.

    One that cannot load the model is not approved.
    """
    names = list_engines(with_int8=True)
    return [open_runtime(predictor, name, keep) for name in names if name in predictor.card.runtimes]


def open_runtime(predictor: Predictor, name: str, keep: Keep | None = None) -> RuntimeCheck:
    """Open a bundle's model in another engine; one that does not load it has no predictor."""
    try:
        return RuntimeCheck(name, Predictor(predictor.bundle, engine=name, keep=keep))
    except BundleError:
        return RuntimeCheck(name, None)


def try_engine(
    name: str,
    reference: Predictor,
    prepared: Prepared,
    rows_n: IntArray,
    outputs: Sequence[Outputs],
    *,
    most: float,
    keep: Keep | None = None,
) -> RuntimeCheck:
    """Compare an engine with `outputs`, what the reference gave for these rows, in batches of their sizes.

    It ends where not even twice as many images could bring the bound down to `most`: that changes no verdict.
    """
    check, start = open_runtime(reference, name, keep), 0
    for ours in outputs:
        stop = start + len(ours.probs_nk)
        check.compare(prepared.read(rows_n[start:stop]), ours, reference)
        start = stop
        if bound_errors(check.num_changed, 2 * len(rows_n), DELTA) > most:
            break
    return check


def describe_runtimes(checks: Sequence[RuntimeCheck]) -> list[str]:
    """Return a line for each engine that is not approved."""
    return [
        f"LOOK: {check.name} is not approved for this model: {_describe(check)}"
        for check in checks
        if not check.is_approved
    ]


def _describe(check: RuntimeCheck) -> str:
    if check.predictor is None:
        return "it does not load it"
    if check.rise is not None and check.rise > MOST_RISE:
        worst = sorted(check.class_rise.items(), key=lambda item: -item[1])[:3]
        classes = ", ".join(f"{name} {rise:+.3f}" for name, rise in worst)
        return f"log loss is {check.rise:.3f} higher, at most {MOST_RISE:g} may be; by class: {classes}"
    return f"{check.num_changed:,} other answers, probabilities differ by up to {check.difference:.0e}"


def describe_few(num_images: int, most: float) -> str:
    """Say that so few images cannot show what is asked; nothing where they can."""
    least = count_flawless(most, DELTA)
    if num_images >= least:
        return ""
    return (
        f"{num_images:,} images (one of a group) that it has not learned from; {least:,} must be answered alike "
        f"to show that at most {100 * most:g} % of the answers differ: {least - num_images:,} more are needed"
    )


def describe_bound(check: RuntimeCheck, most: float) -> str:
    """Say in how many answers an engine differs, the bound, and how many more images could show that it is small."""
    bound = f"at most {100 * check.most_changed:.2g} % with 95 %"
    doubted = f" ({check.num_doubted:,} of them only in whether it knows: train.abstain)" if check.num_doubted else ""
    found = f"{check.num_changed:,} of {check.num_images:,} answers differ{doubted}, {bound}"
    if check.most_changed <= most:
        return found
    more = _count_more(check, most)
    way_out = f"; with about {more:,} more such images it would pass" if more else ""
    return f"{found}; expected at most {100 * most:g} %{way_out}"


def _count_more(check: RuntimeCheck, most: float) -> int | None:
    """Return how many more images would do, if as few of them differed; None where no number near would."""
    share = check.num_changed / max(check.num_images, 1)
    for factor in np.arange(1.1, 20, 0.1):
        number = round(check.num_images * factor)
        if share < most and bound_errors(round(share * number), number, DELTA) <= most:
            return number - check.num_images
    return None


def load_approved(reports_dir: Path, bundle_digest: str) -> tuple[str, ...] | None:
    """Return the engines that an evaluation of this bundle approved; None where there is no such report."""
    try:
        report = json.loads((reports_dir / "intervals.json").read_text(encoding="utf-8"))
        if report["bundle"] != bundle_digest:
            return None
        return tuple(
            row["runtime"] for row in report["runtimes"] if row["approved"] is True and row["runtime"] in ENGINES
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _compute_losses(truth: NDArray[Any], probs_nk: FloatArray) -> NDArray[np.float64]:
    """Return the log loss of each image, (n,); of several labels the mean over classes."""
    if truth.ndim == 1:
        return compute_log_losses(truth, probs_nk)
    return np.asarray(compute_label_losses(truth.astype(bool), probs_nk).mean(axis=1))


def _compute_cosine(ours_nd: FloatArray, theirs_nd: FloatArray) -> float:
    """Return the least cosine between two embeddings of one image; 0 where one is no direction."""
    lengths_n = np.linalg.norm(ours_nd, axis=1) * np.linalg.norm(theirs_nd, axis=1)
    cosine_n = (ours_nd * theirs_nd).sum(axis=1) / np.where(lengths_n > 0, lengths_n, 1.0)
    return float(np.nan_to_num(cosine_n, nan=0.0).min(initial=1.0))


def _round(value: float) -> float:
    return round(value, 3) + 0.0 if np.isfinite(value) else 99.0


class KeptOutputs:
    """What engines gave for batches of images, kept in a folder: it does not depend on what the card decides.

    ENGINE.npz    `about`: the graph, the runtime and the machine that gave it; by the digest of a batch: its outputs

    What is damaged, or of another graph or machine, is computed again, and told once. A disk that is full is told too.
    Above MOST_KEPT_BYTES of an engine no more are kept.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder, self._tell, self._is_told = folder, tell, False
        self._open: list[_KeptSession] = []

    def open(self, engine: str, model_bytes: bytes, open_session: Callable[[], Any]) -> "_KeptSession":
        """Return a session that runs the network only on images that it has not seen: a `Keep` of a predictor."""
        graph = hashlib.sha256(model_bytes).hexdigest()
        about = {"graph": graph, "code": _hash_code(), **describe_machine(engine.partition(" ")[0])}
        path = self._folder / f"{engine.replace(' ', '-')}.npz"
        known, why = _load_kept(path, about)
        if why and not self._is_told:
            self._tell(f"engines: compares their answers again: {why}")
            self._is_told = True
        self._open.append(_KeptSession(path, about, known, open_session))
        return self._open[-1]

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Keep what the sessions that are opened in here compute, also where it is stopped."""
        try:
            yield
        finally:
            try:
                for session in self._open:
                    session.save()
            except OSError as exc:
                self._tell(f"engines: their answers cannot be kept ({exc.strerror}): the next threshold takes longer")
            self._open.clear()


class _KeptSession:
    """An engine's session that knows what it gave before. It is opened when it is needed, or where it knows nothing."""

    def __init__(
        self, path: Path, about: Mapping[str, Any], known: dict[str, FloatArray], open_session: Callable[[], Any]
    ) -> None:
        self._path, self._about, self._known, self._open_session = path, about, known, open_session
        self._session = None if known else open_session()
        self._num_bytes, self._is_saved = sum(array.nbytes for array in known.values()), True

    def run(self, names: Sequence[str], inputs: Mapping[str, UInt8Array]) -> list[FloatArray]:
        """Return the outputs of these names."""
        digest = hashlib.sha256()
        for name, images in inputs.items():
            digest.update(f"{name} {images.shape} ".encode())
            digest.update(np.ascontiguousarray(images).data)
        keys = [f"{digest.hexdigest()} {name}" for name in names]
        if all(key in self._known for key in keys):
            return [self._known[key] for key in keys]
        self._session = self._session or self._open_session()
        outputs: list[FloatArray] = self._session.run(names, inputs)
        num_bytes = self._num_bytes + sum(array.nbytes for array in outputs)
        if num_bytes <= MOST_KEPT_BYTES:
            self._known |= dict(zip(keys, outputs, strict=True))
            self._num_bytes, self._is_saved = num_bytes, False
        return outputs

    def save(self) -> None:
        """Write what is known, if some of it is new. Raises OSError."""
        if not self._is_saved:
            arrays: dict[str, Any] = {"about": np.array(json.dumps(self._about)), **self._known}
            write_through(self._path, lambda file: np.savez(file, **arrays))
            self._is_saved = True


@functools.cache
def _hash_code() -> str:
    """Return the digest of the code that opens a runtime and runs it."""
    return hash_file(Path(inspect.getfile(Predictor)))


def _load_kept(path: Path, about: Mapping[str, Any]) -> tuple[dict[str, FloatArray], str]:
    """Return what is kept in a file, and why it is not used where there is one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            made: dict[str, Any] = json.loads(str(arrays["about"]))
            other = sorted(key for key in about if made.get(key) != about[key])
            if other:
                return {}, f"what is kept of them is of another {' and '.join(other)}"
            if not arrays.zip.testzip():  # numpy looks at no checksum of an array that says to be shorter
                return {key: arrays[key] for key in arrays.files if key != "about"}, ""
    except FileNotFoundError:
        return {}, ""
    except Exception:  # of a damaged file, zipfile and numpy raise anything
        return {}, f"{path.name} is damaged"
    return {}, f"{path.name} is damaged"
