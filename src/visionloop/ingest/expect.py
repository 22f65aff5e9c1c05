"""What a dataset must be before a version is made of it: its classes, and what `ingest.expect` asks for. Pure."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

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


def check_classes(name: str, classes: Collection[str], refused: Sequence[Rejected]) -> None:
    """Raise SourceError when there are fewer than two classes; it names what the other images were refused for."""
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


def check_expectations(name: str, expect: Expect, records: Iterable[ImageRecord]) -> None:
    """Raise SourceError naming everything that is broken. Excluded images do not count, unlabelled ones in no class."""
    if expect == Expect():
        return
    counts, sources, of_other_size = Counter[str](), set[str](), list[str]()
    shortest, longest = expect.size_px or (0, float("inf"))
    for record in records:
        sources.update(record.sources)
        if record.side != "excluded":
            counts.update(record.labels)
            if min(record.width, record.height) < shortest or max(record.width, record.height) > longest:
                of_other_size.append(f"{record.origins[0]} {record.width}x{record.height}")
    broken = _compare_classes(expect, counts)
    if expect.sources is not None and (foreign := sources - {*expect.sources}):
        broken.append(f"sources that may not deliver ({shorten([*foreign])})")
    if of_other_size:
        number = f"{len(of_other_size)} images with a side outside {shortest} to {longest} px"
        broken.append(f"{number} ({shorten(of_other_size)})")
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


def check_new_classes(
    params: Params,
    labels: Iterable[str],
    new: Counter[Labels],
    relabelled: Iterable[Labels] = (),
    *,
    option: str = "`visionloop ingest --allow-new-classes`",
) -> None:
    """Raise SourceError if new images bring classes that look like a mistake: most of them, or with a folder's name.

    `labels` are those that the dataset has; `new` counts the new images by theirs. Of images that are `relabelled` on
    request only a folder's name is one. Classes that `ingest.expect.classes` names are as they should be. `option` is
    how the reader may allow them.
    """
    known = {*labels, *(params.ingest.expect.classes or ())}
    new = new + Counter(labels for labels in relabelled if any(map(is_generic_name, labels)))
    counts = Counter[str]()
    for some, number in new.items():
        counts.update({label: number for label in some if label not in known})
    num_new = sum(number for some, number in new.items() if {*some} & counts.keys())
    generic = [label for label in counts if is_generic_name(label)]
    if not generic and 2 * num_new <= sum(number for some, number in new.items() if some):
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


def find_small_classes(params: Params, counts: Mapping[str, int]) -> dict[str, int]:
    """Return the classes that are left out, with their images: fewer than `ingest.expect.min_per_class`.

    `counts` are the images of each class that are not excluded. That few is an error, and not left out, of a class that
    `ingest.expect.classes` names, with `task: multilabel`, and where two classes would not remain.
    """
    expect = params.ingest.expect
    if params.task == "multilabel":
        return {}
    small = {c: n for c, n in counts.items() if n < expect.min_per_class and c not in (expect.classes or ())}
    return small if len(counts) - len(small) >= MIN_CLASSES else {}
