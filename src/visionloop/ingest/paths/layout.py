"""Labels and sides from where files lie: class folders, split folders above or below them, or names by a pattern. Pure.

One function for every source whose images have paths: folders, archives, buckets. What can be read in one way is told;
what can be read in two ways is refused, with the two answers.
"""

import shlex
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from visionloop.errors import SourceError, shorten
from visionloop.ingest.item import PassedOver
from visionloop.ingest.paths.names import find_twins, is_known_hidden, is_label, make_label
from visionloop.ingest.paths.pattern import Pattern, make_pattern
from visionloop.ingest.paths.rules import NO_FOLDER, Reading, Rule
from visionloop.ingest.paths.tree import find_flat_splits, find_place

MAX_FLAGS = 5


@dataclass(frozen=True, slots=True)
class Placement:
    """What a path says about its image. No `labels`: for prediction only. `side` and `test_is_given` as in `Item`."""

    labels: tuple[str, ...]
    side: str | None = None
    test_is_given: bool = False
    group: str | None = None


def place_all(
    paths: Sequence[str],
    where: str,
    tell: Callable[[str], None],
    *,
    pattern: str | None = None,
    unlabelled: Sequence[str] = (),
    passed: PassedOver | None = None,
) -> list[Placement | str | None]:
    """Return for each path what it says, or a sentence why it has no label; None for a small copy, to be passed over.

    What is guessed is told.

    Paths have `/` between their parts. Folders of `unlabelled` hold images for prediction only. `passed` are the files
    beside them: a class folder that holds nothing else is told.

    Raises:
        SourceError: the pattern is not valid, no path has a label, or there are two ways to read them.
    """
    given = make_pattern(pattern, where) if pattern else None
    reading = Reading(paths, where, tell, given, [folder.strip("/") for folder in unlabelled])
    reading.read()
    found = _place_each(paths, reading)
    is_asked = bool(unlabelled) and bool(found) and all(isinstance(one, Placement) for one in found if one)
    if not is_asked and not any(isinstance(one, Placement) and one.labels for one in found):
        raise _refuse(paths, where, given, passed or PassedOver(), reading)
    _tell_names(found, paths, reading, passed or PassedOver())
    sides = {one.side for one in found if isinstance(one, Placement) and one.side and one.labels}
    settled = settle_sides(sides, reading.tell)
    return [
        Placement(one.labels, *settled[one.side], one.group) if isinstance(one, Placement) and one.side else one
        for one in found
    ]


# Files beside images that often hold their labels, and what to do then.
_AS_CSV = "If the {} holds the labels, save it as CSV (two columns: file, label) beside the images."
LABELS_BESIDE = {suffix: _AS_CSV.format(suffix) for suffix in (".xlsx", ".xls", ".ods", ".numbers", ".xml", ".mat")} | {
    ".txt": "If a .txt lists FILE LABEL on each line, give its path: `visionloop ingest FOLDER/NAME.txt`."
}


def find_unlabelled(paths: Sequence[str]) -> set[str]:
    """Return the paths that would come in without a label. Raises SourceError when they can be read in two ways."""
    reading = Reading(paths, "", lambda line: None, None, [])
    reading.read()
    found = _place_each(paths, reading)
    return {path for path, one in zip(paths, found, strict=True) if isinstance(one, Placement) and not one.labels}


def count_classes(paths: Sequence[str]) -> int:
    """Return how many classes the folders of these paths would give; 2 when that can be read in two ways."""
    reading = Reading(paths, "", lambda line: None, None, [])
    try:
        reading.read()
    except SourceError:
        return 2
    if reading.pattern:
        return 0
    found = _place_each(paths, reading)
    return len({one.labels for one in found if isinstance(one, Placement) and one.labels})


def settle_sides(sides: Collection[str], tell: Callable[[str], None]) -> dict[str, tuple[str | None, bool]]:
    """Return for each side that a source names its side here, and whether the source has a test side of its own.

    With `train` and exactly one held-out side, that one becomes `test`, whatever its name, because people report
    figures on it. It is told when that is a side for validation. Without a side for validation, part of train is used;
    `train` alone is divided into all three sides.
    """
    held_out = [side for side in sides if side != "train"]
    if "train" in sides and len(held_out) == 1:
        if held_out == ["val"]:
            tell("no test side is given, so the images for validation are the test side; validation gets part of train")
        return {"train": (None, True), held_out[0]: ("test", False)}
    has_val, has_test = "val" in sides, "test" in sides
    return {side: (None if side == "train" and not has_val else side, has_test) for side in sides}


def _place_each(paths: Sequence[str], reading: Reading) -> list[Placement | str | None]:
    """Place each path. Without a pattern, what lies in one folder has one place."""
    rules: dict[str, tuple[str, Rule]] = {}
    places: dict[str, Placement | str | None] = {}
    found: list[Placement | str | None] = []
    for path in paths:
        folder = path[: path.rfind("/") + 1]
        if folder not in rules:
            rules[folder] = _find_rule(folder, reading.rules)
        prefix, rule = rules[folder]
        if rule.kind == "names":
            found.append(_place_by_name(path[len(reading.prefix) :], rule, reading.pattern))
            continue
        if folder not in places:
            places[folder] = _place_folder(folder[len(prefix) :], rule)
        found.append(places[folder])
    return found


def _find_rule(folder: str, rules: Mapping[str, Rule]) -> tuple[str, Rule]:
    """Return the rule of the nearest folder above."""
    place = find_place(folder, rules) or ""
    return place, rules[place]


def _place_folder(below: str, rule: Rule) -> Placement | str | None:
    if rule.kind == "passed":
        return None
    if rule.kind == "none":
        return Placement(())
    if rule.kind == "outside":
        return rule.label
    label = make_label(rule.label or below.partition("/")[0])
    if not label:
        return NO_FOLDER
    return Placement((label,), rule.side) if is_label(label) else "the name of its folder cannot be a class"


def _place_by_name(path: str, rule: Rule, pattern: Pattern | None) -> Placement | str:
    match = pattern.match(path) if pattern else None
    label = make_label(match.label) if match else ""
    if match is None or not is_label(label):
        return f"its name does not fit the pattern {pattern.text if pattern else ''}"
    return Placement((label,), match.side or rule.side, False, match.group)


def _tell_names(
    found: Sequence[Placement | str | None], paths: Sequence[str], reading: Reading, passed: PassedOver
) -> None:
    """Tell of class folders without an image, of classes that look alike, and of names with invisible characters."""
    for folder, name in passed.folders:
        if name.startswith(".") and not is_known_hidden(name):
            number = passed.folders[folder, name]
            reading.tell(f"the folder {folder}{name}/ is hidden, and its {number:,} files are passed over: rename it")
    for place, empty in _find_empty(paths, reading, passed):
        reading.tell(f"the folder {place} gives no image: it holds {empty.describe() or 'nothing'}")
    labels = {label for one in found if isinstance(one, Placement) for label in one.labels}
    for names in find_twins(labels):
        reading.tell(f"classes that may be one: {shorten(names)}; `label_map` joins them, best to {names[0]!r}")
    changed = sorted({name for name in _list_class_folders(paths, reading) if make_label(name) != name})
    if changed:
        shown = shorten([ascii(name) for name in changed])
        reading.tell(f"folder names with invisible characters or in another form, taken without: {shown}")


def _list_class_folders(paths: Sequence[str], reading: Reading) -> Iterator[str]:
    around = {*reading.around}
    for folder in {path[: path.rfind("/") + 1] for path in paths}:
        place = find_place(folder, around)
        if place is not None and folder != place:
            yield folder[len(place) :].partition("/")[0]


def _find_empty(paths: Sequence[str], reading: Reading, passed: PassedOver) -> Iterator[tuple[str, PassedOver]]:
    """Yield the folders beside class folders that hold nothing, or files none of which is an image."""
    empty: dict[str, PassedOver] = defaultdict(PassedOver)
    around = {*reading.around}
    for (folder, suffix), number in passed.files.items():
        place = find_place(folder, around)
        if place is not None and folder != place and suffix != "hidden":
            name = folder[len(place) :].partition("/")[0]
            empty[f"{place}{name}/"].files[folder, suffix] += number
    for folder in passed.empty:
        if (place := find_place(folder, around)) is not None and folder != place:
            empty.setdefault(f"{place}{folder[len(place) :].partition('/')[0]}/", PassedOver())
    for folder in {path[: path.rfind("/") + 1] for path in paths} if empty else ():
        if (place := find_place(folder, around)) is not None:
            empty.pop(f"{place}{folder[len(place) :].partition('/')[0]}/", None)
    yield from sorted(empty.items())


def _refuse(
    paths: Sequence[str], where: str, given: Pattern | None, passed: PassedOver, reading: Reading
) -> SourceError:
    if given:
        found = f"no file fits the pattern {given.text}" + (f", as {paths[0]!r} does not" if paths else "")
        return SourceError(where, found, "names like the pattern", "Edit the pattern in params.yaml.")
    bare = sorted(find_flat_splits(paths) or reading.bare)
    nothing = "no image in any class folder"
    found = f"{nothing}: there are no labels in {shorten(bare)}" if bare else nothing
    beside = {suffix for folder, suffix in passed.files if folder.count("/") < 2}
    if hints := [hint for suffix, hint in LABELS_BESIDE.items() if suffix in beside]:
        return SourceError(where, found, "CLASS/IMAGE.jpg, or labels that can be read", " ".join(hints))
    todo = "Put the images of each class into a folder of its name, name the table that holds the labels"
    if not bare:
        todo += ", or give the source a `pattern` for their names."
        return SourceError(where, found, "CLASS/IMAGE.jpg or train/CLASS/IMAGE.jpg", todo)
    stars = "*/" * (bare[0].count("/") - 1)
    flags = " ".join(f"--unlabelled {shlex.quote(folder[:-1])}" for folder in bare[:MAX_FLAGS])
    more = " ..." if len(bare) > MAX_FLAGS else ""
    todo += (
        f" (`--table FILE`), or say `--pattern '{stars}{{label}}/'` if these folders are the classes,"
        f" `--pattern '{{label}}_*'` or the like if names hold them, `{flags}{more}` if there"
        " are none: then they come into a data set that has classes, for prediction only."
    )
    return SourceError(where, found, "CLASS/IMAGE.jpg or train/CLASS/IMAGE.jpg", todo)
