"""What `ingest.expect` asks of a dataset, held against its rows before a version is made of them. Pure."""

from collections import Counter
from collections.abc import Sequence

from visionloop.errors import SourceError, shorten
from visionloop.params import Expect
from visionloop.records import ImageRecord


def check_expectations(name: str, expect: Expect, records: Sequence[ImageRecord]) -> None:
    """Raise SourceError naming everything that is broken. Excluded images do not count, unlabelled ones in no class."""
    if expect == Expect():
        return
    used = [record for record in records if record.side != "excluded"]
    counts = Counter(label for record in used for label in record.labels)
    broken = [*_check_classes(expect, counts), *_check_sources(expect, records), *_check_sizes(expect, used)]
    if broken:
        raise SourceError(
            f"dataset {name}",
            "; ".join(broken),
            "what ingest.expect in params.yaml asks for; no version was made",
            "Mend the source, or change ingest.expect.",
        )


def _check_classes(expect: Expect, counts: Counter[str]) -> list[str]:
    broken = []
    if expect.classes is not None and (foreign := set(counts) - set(expect.classes)):
        broken.append(f"classes that are not expected ({shorten([f'{c}: {counts[c]} images' for c in foreign])})")
    names = {*(expect.classes or ()), *counts}
    if few := [f"{c}: {counts[c]}" for c in names if counts[c] < expect.min_per_class]:
        broken.append(f"fewer than {expect.min_per_class} images of {shorten(few)}")
    if expect.max_imbalance is not None and counts:
        (most, high), (least, low) = counts.most_common(1)[0], min(counts.items(), key=lambda pair: (pair[1], pair[0]))
        if high > expect.max_imbalance * low:
            ratio = f"{high / low:.1f} times"
            broken.append(
                f"{ratio} as many images of {most} ({high}) as of {least} ({low}), not {expect.max_imbalance:g}"
            )
    return broken


def _check_sources(expect: Expect, records: Sequence[ImageRecord]) -> list[str]:
    if expect.sources is None:
        return []
    foreign = {source for record in records for source in record.sources} - set(expect.sources)
    return [f"sources that may not deliver ({shorten([*foreign])})"] if foreign else []


def _check_sizes(expect: Expect, used: Sequence[ImageRecord]) -> list[str]:
    if expect.size_px is None:
        return []
    shortest, longest = expect.size_px
    bad = [r for r in used if min(r.width, r.height) < shortest or max(r.width, r.height) > longest]
    if not bad:
        return []
    named = shorten([f"{r.origins[0]} {r.width}x{r.height}" for r in bad])
    return [f"{len(bad)} images with a side outside {shortest} to {longest} px ({named})"]
