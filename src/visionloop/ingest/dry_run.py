"""What a pull of one source would bring, before anything is read or written: `visionloop ingest WHAT --dry-run`.

The source is listed as in a pull, and no image is opened. What is damaged, a copy or too large shows only in a pull.
"""

from collections import Counter
from dataclasses import dataclass, field

from visionloop.errors import SourceError
from visionloop.ingest.item import Item, PassedOver, SourceContext
from visionloop.ingest.sources import read_source
from visionloop.params import Source
from visionloop.records import Rejected

SHOWN_SAMPLES = 3
UNLABELLED = "(unlabelled)"
DECIDED = "decided at ingest"
# Only reading these says what they hold.
NOT_LISTED = {"video": "its frames", "digits": "its images"}


@dataclass
class Outline:
    """What a source offers: images by class and side, the first names of each class, and what is not taken."""

    source: str
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    samples: dict[str, list[str]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    passed: PassedOver = field(default_factory=PassedOver)
    num_images: int = 0

    def add(self, item: Item) -> None:
        """Count an image for each of its classes."""
        self.num_images += 1
        side = item.side or ("train or val" if item.test_is_given else DECIDED)
        for label in item.labels or (UNLABELLED,):
            self.counts.setdefault(label, Counter())[side if item.labels else "no side"] += 1
            shown = self.samples.setdefault(label, [])
            if len(shown) < SHOWN_SAMPLES:
                shown.append(item.origin.partition(":")[2])


def outline_source(source: Source, context: SourceContext) -> Outline:
    """List a source. Nothing is written, and no image is opened.

    Raises:
        SourceError: the source cannot be read as a whole, or only reading it says what it holds.
    """
    if source.kind in NOT_LISTED:
        raise SourceError(
            "--dry-run",
            f"source {source.name} is of kind {source.kind}: {NOT_LISTED[source.kind]} are known only by reading it",
            "a source that can be listed",
            "Pull it into a workspace of its own: `visionloop new`.",
        )
    outline = Outline(source.name)
    for one in read_source(source, context):
        if isinstance(one, Item):
            outline.add(one)
        elif isinstance(one, Rejected):
            outline.rejected.append(one)
        elif isinstance(one, PassedOver):
            outline.passed.files.update(one.files)
            outline.passed.folders.update(one.folders)
    return outline
