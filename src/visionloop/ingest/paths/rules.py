"""How the paths of one source are read: a rule for some of its folders. Pure.

What can be read in one way is told; what can be read in two ways is refused, with the two answers.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from visionloop.errors import SourceError, shorten
from visionloop.ingest.paths.names import (
    cut_side,
    find_side,
    has_no_labels,
    is_date,
    is_holder,
    is_unlabelled_name,
    split_name,
)
from visionloop.ingest.paths.pattern import Pattern, guess_pattern
from visionloop.ingest.paths.tree import (
    Folder,
    are_bare,
    find_groups,
    find_place,
    find_sides,
    find_sides_below,
    find_small_copies,
    leave_out,
    make_tree,
    pass_wrappers,
    skip_lone,
)

SAMPLE = 100
NO_FOLDER = "it lies in no class folder"


@dataclass(frozen=True, slots=True)
class Rule:
    """How what lies below one folder is read.

    `classes`: the folders in it are classes. `label`: it is one class itself. `names`: by the pattern. `none`: without
    labels. `outside`: it cannot be used, and `label` says why. `passed`: it is passed over.
    """

    kind: str
    side: str | None = None
    label: str = ""


class Reading:
    """How all paths of one source are read: a rule for some folders (their paths, with a `/` at the end)."""

    def __init__(
        self,
        paths: Sequence[str],
        where: str,
        tell: Callable[[str], None],
        pattern: Pattern | None,
        unlabelled: Sequence[str],
    ) -> None:
        self.pattern, self.prefix = pattern, ""
        self.rules: dict[str, Rule] = {"": Rule("outside", label=NO_FOLDER)}
        self.around: list[str] = []  # the folders that hold class folders
        self.bare: Sequence[str] = ()  # folders of parts of the data set, without class folders in them
        self._where, self._tell = where, tell
        for folder in unlabelled:
            self.rules[f"{folder}/"] = Rule("none")
        self._paths = leave_out(paths, {f"{folder}/" for folder in unlabelled})
        if small := find_small_copies(self._paths, pattern.text if pattern else ""):
            self._paths = leave_out(self._paths, {*small})
            self.rules |= dict.fromkeys(small, Rule("passed"))
            self.tell(f"folders of small copies are passed over: {shorten(small)} (to take one, give it another name)")

    def tell(self, line: str) -> None:
        self._tell(f"{self._where}: {line}")

    def read(self) -> None:
        """Choose the rules. Raises SourceError when two ways are as likely."""
        folder = make_tree(self._paths)
        self.prefix, folder = pass_wrappers(folder, "")
        if self.pattern:
            self._read_by_pattern(folder, self.pattern)
            return
        if self.prefix:
            self.tell(f"all images are inside {self.prefix}, so this name is not taken for a class")
        sides = find_sides(folder)
        splits = {name: side for name, side in sides.items() if side}
        others = [name for name in sides if name not in splits]
        without = [name for name in others if is_unlabelled_name(name) or (splits and has_no_labels(name))]
        if len(without) < len(sides):
            others = [name for name in others if name not in without]
            for name in without:
                self._take_unlabelled(f"{self.prefix}{name}/", folder.folders[name])
        if splits and not others:
            self._read_splits(self.prefix, folder, splits)
        elif splits:
            self._read_mixed(folder, splits, others)
        elif others:
            self._read_classes(folder, others)
        else:
            self._guess_pattern([self.prefix], folder.num_here)

    def _take_unlabelled(self, place: str, folder: Folder) -> None:
        self.rules[place] = Rule("none")
        self.tell(f"images of {place} without labels, for prediction only: {folder.num_all:,}")

    def _take_classes(self, place: str, side: str | None = None) -> None:
        self.rules[place] = Rule("classes", side)
        self.around.append(place)

    def _read_by_pattern(self, folder: Folder, pattern: Pattern) -> None:
        if pattern.whole_path and self.prefix and any(map(pattern.match, islice(self._paths, SAMPLE))):
            self.prefix, folder = "", make_tree(self._paths)
        self.rules[self.prefix] = Rule("names")
        sides = {} if pattern.num_folders else find_sides(folder)
        for name, side in sides.items():
            place = f"{self.prefix}{name}/"
            below = islice((path for path in self._paths if path.startswith(place)), SAMPLE)
            if side and any(pattern.match(path[len(self.prefix) :]) for path in below):
                self.rules[place] = Rule("names", side)
            elif side and len(sides) > 1:
                self._take_unlabelled(place, folder.folders[name])

    def _read_splits(self, prefix: str, folder: Folder, splits: Mapping[str, str]) -> None:
        """Read split folders: class folders inside, else names by a pattern."""
        everything = {name for split in splits for name in self._class_names(folder.folders[split])}
        places: dict[str, tuple[str, Folder]] = {}
        for split in splits:
            way, inside = skip_lone(folder.folders[split], split, everything)
            places[split] = f"{prefix}{split}/{way}", inside
            if way:
                self.tell(f"all of {prefix}{split}/ is inside {way}, so this name is not taken for a class")
        known = {name for split, (_, inside) in places.items() if splits[split] == "train" for name in inside.folders}
        labelled = {
            split
            for split, (_, inside) in places.items()
            if inside.folders
            and not are_bare(inside.folders)
            and (len(known) < 2 or len(inside.folders) > 1 or set(inside.folders) <= known)
        }
        for split in labelled:
            self._take_split(places[split], splits[split])
        if not labelled:
            labelled = self._read_flat_splits(places, splits)
        for split in splits:
            if split not in labelled and labelled:
                self._take_unlabelled(f"{prefix}{split}/", folder.folders[split])

    def _take_split(self, place: tuple[str, Folder], side: str) -> None:
        """Take the folders in a split folder for classes; in `train/train_cat` the word says nothing more."""
        prefix, inside = place
        stars = "*/" * self.prefix.count("/")
        depth = prefix[len(self.prefix) :].count("/") - 1
        if all(map(find_side, inside.folders)):
            raise self._ask(
                f"{prefix} is a split folder, and so are {shorten(list(inside.folders))} in it",
                f"--pattern '{stars}{{side}}/*/{{label}}/' if the upper ones are the sides",
                f"--pattern '{stars}*/{{side}}/{{label}}/' if the lower ones are",
            )
        self._take_below(prefix, inside, f"{stars}{{side}}/{'*/' * depth}", side)
        if len(inside.folders) > 1 and all(split_name(name)[0] == side for name in inside.folders):
            for name in inside.folders:
                self.rules[f"{prefix}{name}/"] = Rule("label", side, cut_side(name))
            labels = shorten([cut_side(name) for name in inside.folders])
            self.tell(f"the folders in {prefix} repeat its side, so the classes are {labels}")

    @staticmethod
    def _class_names(folder: Folder) -> list[str]:
        return list(folder.folders) if len(folder.folders) > 1 else []

    def _read_flat_splits(self, places: Mapping[str, tuple[str, Folder]], splits: Mapping[str, str]) -> set[str]:
        train = [place for split, (place, _) in places.items() if splits[split] == "train"]
        pattern = self._guess_pattern(train or [place for place, _ in places.values()], 1)
        if pattern is None:
            return set()
        self.rules[self.prefix] = Rule("outside", label=NO_FOLDER)
        labelled = set()
        for split, (place, _) in places.items():
            below = islice((path for path in self._paths if path.startswith(place)), SAMPLE)
            if any(map(pattern.match, below)):
                labelled.add(split)
                self.rules[place] = Rule("names", splits[split])
        return labelled

    def _guess_pattern(self, places: Sequence[str], num_here: int) -> Pattern | None:
        inside = {*places}
        below = (path for path in self._paths if find_place(path[: path.rfind("/") + 1], inside) is not None)
        names = [*below] if num_here else []
        self.pattern = guess_pattern(names)
        if self.pattern:
            self.tell(f"no class folders, labels guessed from names by the pattern {self.pattern.text}")
            self.rules[self.prefix] = Rule("names")
        return self.pattern

    def _read_mixed(self, folder: Folder, splits: Mapping[str, str], others: Sequence[str]) -> None:
        """Read split folders beside folders of other names."""
        flat = [name for name in splits if not skip_lone(folder.folders[name], name)[1].folders]
        if len(flat) == len(splits) and are_bare({name: folder.folders[name] for name in others}):
            self._read_bare([f"{self.prefix}{name}/" for name in (*splits, *others)])
            return
        if len(flat) < len(splits):
            self._read_splits_among(folder, splits, others)
            return
        asked = [name for name in flat if splits[name] == "test"]
        if asked or len(set(splits.values())) > 1 or all(map(is_holder, others)):
            name = (asked or flat)[0]
            raise self._ask(
                f"{name}/ may be a class beside {shorten(list(others))}, or hold images without labels",
                f"--pattern '{'*/' * self.prefix.count('/')}{{label}}/' if it is a class",
                f"--unlabelled {self.prefix}{name} if it is not",
            )
        self.tell(f"{shorten(flat)} beside the class folders {shorten(list(others))}: taken for a class")
        self._take_classes(self.prefix)

    def _read_splits_among(self, folder: Folder, splits: Mapping[str, str], others: Sequence[str]) -> None:
        inner = {name: set(folder.folders[name].folders) for name in (*splits, *others)}
        copies = [name for name in others if inner[name] and all(map(find_side, inner[name]))]
        rest = [name for name in others if name not in copies]
        classes = set().union(*(inner[name] for name in splits))
        alike = [name for name in rest if len(inner[name]) > 1 and inner[name] <= classes]
        if alike or (len(rest) > 1 and len(splits) == 1):
            split = next(name for name in splits if inner[name])
            raise self._ask(
                f"{split}/ may be a split, or a class beside {shorten(rest)}",
                f"--pattern '{'*/' * self.prefix.count('/')}{{side}}/{{label}}/' if the classes are inside",
                f"--pattern '{'*/' * self.prefix.count('/')}{{label}}/' if they are at the top",
            )
        self.rules[self.prefix] = Rule("outside", label=f"it lies outside of the split folders {shorten([*splits])}")
        self._read_splits(self.prefix, folder, splits)
        for name in copies:
            inside = folder.folders[name]
            self.tell(f"{self.prefix}{name}/ holds split folders too, and is read with them")
            sides = {one: side for one in inside.folders if (side := find_side(one))}
            self._read_splits(f"{self.prefix}{name}/", inside, sides)

    def _read_classes(self, folder: Folder, names: Sequence[str]) -> None:
        """Read folders none of which is a split: classes, classes with a split's word, sites, parts of a data set."""
        parts = {name: split_name(name) for name in names}
        if len(names) > 1 and all(side for side, _ in parts.values()):
            self._read_named_splits(folder, parts)
            return
        if are_bare({name: folder.folders[name] for name in names}):
            self._read_bare([f"{self.prefix}{name}/" for name in names])
        else:
            self._take_below(self.prefix, folder, "*/" * self.prefix.count("/"))

    def _read_bare(self, places: Sequence[str]) -> None:
        """Read flat parts of a data set: by their files' names, or not at all."""
        self.bare = places
        self._guess_pattern(places, 1)

    def _take_below(self, prefix: str, folder: Folder, above: str, side: str | None = None) -> None:
        """Take the folders in a folder for classes; or those inside them, if these are sites or parts.

        `above` is the pattern of the folders around. Raises SourceError when both are plausible.
        """
        folders = {name: one for name, one in folder.folders.items() if f"{prefix}{name}/" not in self.rules}
        below = {name: found for name, one in folders.items() if (found := find_sides_below(one, name))[1]}
        if below and side is None:
            self._read_sides_below(prefix, folder, below, above)
            return
        groups = find_groups(folders)
        if groups is None:
            self._take_classes(prefix, side)
            return
        tops = shorten([*groups.ways])
        if not groups.are_sure:
            raise self._ask(
                f"{tops} hold the folders {shorten(groups.inside)}",
                f"--pattern '{above}{{label}}/' if the classes are {tops}",
                f"--pattern '{groups.make_pattern(above)}' if they are {shorten(groups.inside)}",
            )
        self.tell(
            f"{tops} are taken for groups, and the folders in them for the classes: {shorten(groups.inside)}"
            f" (if {tops} are the classes: --pattern '{above}{{label}}/')"
        )
        for name, way in groups.ways.items():
            place = folder.folders[name]
            for lone in way.split("/")[:-1]:
                place = place.folders[lone]
            self._take_below(f"{prefix}{name}/{way}", place, f"{above}*/{'*/' * way.count('/')}", side)

    def _read_named_splits(self, folder: Folder, parts: Mapping[str, tuple[str | None, tuple[str, ...]]]) -> None:
        """Read `train_cats, train_dogs, test_cats, test_dogs`: each folder is a class and a side."""
        sides_of = defaultdict(set)
        for side, rest in parts.values():
            sides_of[rest].add(side)
        if len(sides_of) < 2 or () in sides_of or any(len(sides) < 2 for sides in sides_of.values()):
            raise self._ask(
                f"the folders {shorten(list(parts))} have names of splits, and no class folders inside",
                f"--pattern '{'*/' * self.prefix.count('/')}{{label}}/' if they are classes",
                "folders train/CLASS and test/CLASS if they are not",
            )
        for name, (side, _) in parts.items():
            self.rules[f"{self.prefix}{name}/"] = Rule("label", side, cut_side(name))
        labels = sorted({rule.label for rule in self.rules.values() if rule.kind == "label"})
        self.tell(f"each folder names a side and a class: {shorten(labels)}")

    def _read_sides_below(
        self, prefix: str, folder: Folder, below: Mapping[str, tuple[str, Mapping[str, str]]], above: str
    ) -> None:
        """Take the split folders inside class folders, each with the way to them, for sides."""
        deeper, ways = set(), {way for way, _ in below.values()}
        for name, (way, sides) in below.items():
            place = folder.folders[name]
            for lone in way.split("/")[:-1]:
                place = place.folders[lone]
            deeper |= {one for split in sides for one in place.folders[split].folders}
            for split, side in sides.items():
                self.rules[f"{prefix}{name}/{way}{split}/"] = Rule("label", side, name)
        if len(deeper) > 1 and not all(map(is_date, deeper)):
            skipped = "*/" * ways.pop().count("/") if len(ways) == 1 else "**/"
            raise self._ask(
                f"the split folders in {shorten(list(below))} hold the folders {shorten(list(deeper))}",
                f"--pattern '{above}*/{skipped}{{side}}/{{label}}/' if these are the classes",
                f"--pattern '{above}{{label}}/{skipped}{{side}}/' if the classes are {shorten(list(below))}",
            )
        self.tell(f"split folders below the class folders {shorten(list(below))}: taken as sides")
        self._take_classes(prefix)

    def _ask(self, found: str, first: str, second: str) -> SourceError:
        return SourceError(
            self._where,
            f"can be read in two ways: {found}",
            "one way to read it",
            f"Say {first}, or {second} (in params.yaml: `pattern`, `unlabelled`).",
        )
