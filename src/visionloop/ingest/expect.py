"""What a dataset must be before a version is made of it: its classes, and what `ingest.expect` asks for. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from visionloop.errors import SourceError, shorten
from visionloop.ingest.labels import Labels
from visionloop.ingest.paths.names import find_side
from visionloop.params import Expect, Params
from visionloop.records import ImageRecord, Rejected

MIN_CLASSES = 2
# What people call a folder of anything; with the names of splits, no names for a class.
GENERIC = frozenset(
    re.findall(
        r"\w+",
        "images image imgs img pictures picture pics photos photo files file data dataset datasets set sets folder "
        "folders new raw original originals all samples sample input inputs output outputs upload uploads download "
        "downloads copy train training trainset valid validation val dev eval test tests testing testset holdout",
    )
)


def check_classes(name: str, records: Sequence[ImageRecord], refused: Sequence[Rejected]) -> None:
    """Raise SourceError when there are fewer than two classes; it names what the other images were refused for."""
    classes = {label for r in records if r.side != "excluded" for label in r.labels}
    if len(classes) >= MIN_CLASSES:
        return
    codes = Counter(one.code for one in refused)
    found = f"has {len(classes)} class ({shorten(list(classes)) or 'none'})"
    for code, number in codes.most_common(3):
        first = min((one for one in refused if one.code == code), key=lambda one: one.origin)
        found += f", and {number:,} not taken as {code}, such as {first.origin} ({first.reason[:120]})"
    todos = {
        "several_labels": "Set `task: multilabel`.",
        "label_conflict": "Keep one copy of each image, or say which label is right in ingest.corrections.",
    }
    worst = codes.most_common(1)[0][0] if codes else ""
    others = "Mend what was not taken." if codes else "Add a folder of images for each other class."
    raise SourceError(f"dataset {name}", found, "two classes or more", todos.get(worst, others))


def check_expectations(name: str, expect: Expect, records: Sequence[ImageRecord]) -> None:
    """Raise SourceError naming everything that is broken. Excluded images do not count, unlabelled ones in no class."""
    if expect == Expect():
        return
    used = [record for record in records if record.side != "excluded"]
    counts = Counter(label for record in used for label in record.labels)
    broken = [*_compare_classes(expect, counts), *_compare_sources(expect, records), *_compare_sizes(expect, used)]
    if broken:
        raise SourceError(
            f"dataset {name}",
            "; ".join(broken),
            "what ingest.expect in params.yaml asks for; no version was made",
            "Mend the source and say `--prune`, which takes out what it no longer has; or change ingest.expect.",
        )


def _compare_classes(expect: Expect, counts: Counter[str]) -> list[str]:
    broken = []
    if expect.classes is not None and (foreign := set(counts) - set(expect.classes)):
        broken.append(f"classes that are not expected ({shorten([f'{c}: {counts[c]} images' for c in foreign])})")
    names = {*(expect.classes or ()), *counts}  # others with few images were left out, unless they share images
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


def _compare_sources(expect: Expect, records: Sequence[ImageRecord]) -> list[str]:
    if expect.sources is None:
        return []
    foreign = {source for record in records for source in record.sources} - set(expect.sources)
    return [f"sources that may not deliver ({shorten([*foreign])})"] if foreign else []


def _compare_sizes(expect: Expect, used: Sequence[ImageRecord]) -> list[str]:
    if expect.size_px is None:
        return []
    shortest, longest = expect.size_px
    bad = [r for r in used if min(r.width, r.height) < shortest or max(r.width, r.height) > longest]
    if not bad:
        return []
    named = shorten([f"{r.origins[0]} {r.width}x{r.height}" for r in bad])
    return [f"{len(bad)} images with a side outside {shortest} to {longest} px ({named})"]


def check_new_classes(
    params: Params,
    rows: Iterable[ImageRecord],
    new: Sequence[Labels],
    relabelled: Iterable[Labels] = (),
    *,
    option: str = "`visionloop ingest --allow-new-classes`",
) -> None:
    """Raise SourceError if new images bring classes that look like a mistake: most of them, or with a folder's name.

    Of images that are `relabelled` on request only a folder's name is one. Classes that `ingest.expect.classes` names
    are as they should be. `option` is how the reader may allow them.
    """
    known = {label for row in rows for label in row.labels} | {*(params.ingest.expect.classes or ())}
    new = [*new, *(labels for labels in relabelled if any(map(is_generic_name, labels)))]
    counts = Counter(label for labels in new for label in labels if label not in known)
    num_new = sum(bool(set(labels) & counts.keys()) for labels in new)
    generic = [label for label in counts if is_generic_name(label)]
    if not generic and 2 * num_new <= sum(bool(labels) for labels in new):
        return
    shown = shorten([f"{label}: {counts[label]} images" for label in counts])
    why = (
        f"{shorten(generic)} is a name for a folder rather than a class"
        if generic
        else "most of the new images are in them"
    )
    raise SourceError(
        f"dataset {params.name}",
        f"would get new classes ({shown}), and {why}; no version was made",
        f"classes that it has ({shorten([*known])})",
        f"If they are right: {option}, once, or list all classes in ingest.expect.classes; if not, name the folder "
        "that holds the class folders.",
    )


def is_generic_name(label: str) -> bool:
    """Say whether a label is what people call a folder or a split: `train`, `images2`, `New Folder (3)`, `test_set`."""
    words = [word for word in re.split(r"[\W\d_]+", label.casefold()) if word]
    return find_side(label) is not None or (bool(words) and all(word in GENERIC for word in words))


def find_small_classes(params: Params, rows: Iterable[ImageRecord]) -> dict[str, int]:
    """Return the classes that are left out, with their images: fewer than `ingest.expect.min_per_class`.

    That few is an error, and not left out, of a class that `ingest.expect.classes` names, with `task: multilabel`, and
    where two classes would not remain.
    """
    expect = params.ingest.expect
    counts = Counter(label for row in rows if row.side != "excluded" for label in row.labels)
    if params.task == "multilabel":
        return {}
    small = {c: n for c, n in counts.items() if n < expect.min_per_class and c not in (expect.classes or ())}
    return small if len(counts) - len(small) >= MIN_CLASSES else {}
