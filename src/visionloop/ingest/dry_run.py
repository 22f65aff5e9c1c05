"""What a pull of one source would bring, before anything is read or written: `visionloop ingest WHAT --dry-run`.

The source is listed as in a pull, and no image is opened. What is damaged, a copy or too large shows only in a pull.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from visionloop.errors import SourceError, shorten
from visionloop.ingest.item import Item, PassedOver, SourceContext
from visionloop.ingest.labels import MIN_DIGITS, LabelRules
from visionloop.ingest.moves import WHOLE, find_place
from visionloop.ingest.sources import read_source
from visionloop.params import Source
from visionloop.records import ImageRecord, Rejected

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
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        """Count an image for each of its classes."""
        self.num_images += 1
        self.places[find_place(item.origin)] = item.labels
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


def describe_differences(
    outline: Outline, source: Source, records: Iterable[ImageRecord], rules: LabelRules
) -> list[str]:
    """Tell which places of a dataset's images the source no longer has, or has under another label.

    Only the bytes say what was moved, renamed or edited.
    """
    corrected = {one.sha256[:MIN_DIGITS] for one in rules.corrections}
    there = {*outline.places, *(find_place(one.origin) for one in outline.rejected)}
    absent, other = list[str](), list[str]()
    for record in records:
        for origin in record.origins:
            place = find_place(origin)
            if not origin.startswith(f"{source.name}:"):
                continue
            if place not in there:
                absent.append(origin)
            elif record.sha256[:MIN_DIGITS] not in corrected and _differs(rules, outline.places.get(place), record):
                other.append(origin)
    lines = []
    if absent and source.kind in WHOLE:
        lines.append(
            f"not there: {len(absent):,} places of images of this dataset ({shorten(absent, 2)}): "
            "moved, renamed or gone, as a pull tells"
        )
    if other:
        lines.append(f"labels: {len(other):,} places have another label than in this dataset ({shorten(other, 2)})")
    return lines


def _differs(rules: LabelRules, offered: tuple[str, ...] | None, record: ImageRecord) -> bool:
    return offered is not None and rules.rename(offered) != record.labels
