"""Images by the folders they lie in: what lies around all of them, which are splits, which are sites. Pure."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from visionloop.ingest.paths.names import (
    are_groups,
    are_parts,
    find_side,
    find_weak_side,
    has_no_labels,
    is_date,
    is_holder,
    is_small_copies,
    make_label,
    repeats_name,
    split_name,
)

MAX_WRAPPERS = 8


class Folder:
    """A folder of images: the folders in it, how many images lie in itself, and how many in it at any depth."""

    __slots__ = ("folders", "num_all", "num_here")

    def __init__(self) -> None:
        self.folders: dict[str, Folder] = {}
        self.num_here = self.num_all = 0

    def lone(self) -> str:
        """Return the name of the one folder that everything lies in; or ""."""
        return next(iter(self.folders)) if len(self.folders) == 1 and not self.num_here else ""


def make_tree(paths: Sequence[str]) -> Folder:
    root = Folder()
    for folder, number in Counter(path.rpartition("/")[0] for path in paths).items():
        place = root
        place.num_all += number
        for name in folder.split("/") if folder else ():
            place = place.folders.setdefault(name, Folder())
            place.num_all += number
        place.num_here += number
    return root


def find_place(folder: str, places: Collection[str]) -> str | None:
    """Return the nearest of the places (folders with a `/` at the end, or "") that a folder is or lies in, or None."""
    while folder not in places:
        if not folder:
            return None
        folder = folder[: folder[:-1].rfind("/") + 1]
    return folder


def leave_out(paths: Sequence[str], places: Collection[str]) -> Sequence[str]:
    """Return the paths that lie in none of the places."""
    if not places:
        return paths
    return [path for path in paths if find_place(path[: path.rfind("/") + 1], places) is None]


def find_small_copies(paths: Sequence[str], pattern: str = "") -> list[str]:
    """Return the folders of small copies (`Thumbs/`, `cat/thumbnails/`), unless all images lie in such folders.

    A folder that a pattern names is none.
    """
    folders = {path[: path.rfind("/") + 1] for path in paths}
    beside: dict[str, set[str]] = {}
    if not any(is_small_copies(name) for folder in folders for name in folder.split("/")):
        return []
    for folder in folders:
        parts = folder.split("/")[:-1]
        for depth, name in enumerate(parts):
            beside.setdefault("/".join((*parts[:depth], "")), set()).add(name)
    small = [
        f"{place}{name}/"
        for place, names in beside.items()
        for name in names
        if is_small_copies(name, names) and name.lower() not in pattern.lower()
    ]
    places = set(small)
    return sorted(small) if any(find_place(folder, places) is None for folder in folders) else []


def pass_wrappers(folder: Folder, prefix: str) -> tuple[str, Folder]:
    """Go into folders that hold everything and are neither a class nor a split."""
    for _ in range(MAX_WRAPPERS):
        name = next(iter(folder.folders), "")
        if len(folder.folders) != 1 or find_side(name) or not _is_wrapper(name, folder):
            break
        prefix, folder = f"{prefix}{name}/", folder.folders[name]
    return prefix, folder


def _is_wrapper(name: str, folder: Folder) -> bool:
    inside = folder.folders[name]
    names = list(inside.folders)
    if folder.num_here and (len(names) < 2 or folder.num_here > inside.num_all):
        return False
    if is_holder(name):
        return True
    if any(find_side(one) for one in names):
        return True
    if len(names) == 1:
        return not inside.num_here and _is_wrapper(names[0], inside)
    return len(names) > 1 and not all(map(is_date, names))


def find_sides(folder: Folder) -> dict[str, str | None]:
    """Return the side of each folder. Where all names hold a split's word, other words beside it do not matter."""
    sides = {name: find_side(name) for name in folder.folders}
    weak = {name: side or find_weak_side(name) for name, side in sides.items()}
    loose = {name: side or split_name(name)[0] for name, side in weak.items()}
    others = {name for name in sides if not has_no_labels(name)}
    rests = {split_name(name)[1] for name in others if not weak[name]}
    is_split = len(others) > 1 and all(loose[name] for name in others)
    if is_split and weak != sides and "train" not in loose.values():
        return sides
    return loose if is_split and (len(rests) < 2 or _share_names(folder, others)) else sides


def _share_names(folder: Folder, names: Collection[str]) -> bool:
    """Say whether all these folders hold folders of the same names, or most of them."""
    inside = [set(skip_lone(folder.folders[name], name)[1].folders) for name in names]
    common = set.intersection(*inside) if inside else set()
    return bool(common) and 2 * len(common) >= max(map(len, inside))


def skip_lone(folder: Folder, name: str, known: Collection[str] = ()) -> tuple[str, Folder]:
    """Go into lone folders inside a split folder `name`, unless one is a class; return the way and the folder.

    A lone folder of any name is gone through when there are several folders at the end of the way.
    """
    way, passed, place = "", "", folder
    while (lone := place.lone()) and lone not in known:
        says_nothing = is_holder(lone) or find_side(lone) or split_name(lone)[0] or lone.lower() == name.lower()
        passed, place = f"{passed}{lone}/", place.folders[lone]
        if len(place.folders) > 1 or (says_nothing and way.count("/") == passed.count("/") - 1):
            way, folder = passed, place
    return way, folder


def find_sides_below(folder: Folder, name: str) -> tuple[str, dict[str, str]]:
    """Return the way to the split folders inside a class folder `name`, and their sides; `cat/images/{train,test}`.

    The class's own words may stand beside the split's: `cat/{cat_train,cat_test}`.
    """
    way = ""
    while folder.folders:
        sides = {one: side for one in folder.folders if (side := find_side(one) or _find_own_side(one, name))}
        if len(sides) == len(folder.folders):
            return way, sides
        if not (lone := folder.lone()):
            break
        way, folder = f"{way}{lone}/", folder.folders[lone]
    return "", {}


def _find_own_side(folder: str, name: str) -> str | None:
    side, rest = split_name(folder)
    return side if side and repeats_name(rest, name) else None


@dataclass(frozen=True, slots=True)
class Groups:
    """Folders that hold nearly the same folders: `ways` lead into each of them (below its name), through lone folders.

    `are_sure`: their names say that they are sites or parts, so that the folders inside are the classes. `inside`: the
    names there.
    """

    ways: Mapping[str, str]
    are_sure: bool
    inside: Sequence[str]

    def make_pattern(self, above: str) -> str:
        """Return the pattern for which the folders inside are the classes; `above`: that of the folders above."""
        depths = {way.count("/") for way in self.ways.values()}
        return f"{above}{'*/' * (1 + depths.pop()) if len(depths) == 1 else '**/'}{{label}}/"


def find_groups(folders: Mapping[str, Folder]) -> Groups | None:
    """Say whether folders beside each other are sites or parts of the data, with class folders inside.

    They are when their names say so (`siteA`, `fold_1`, `2023`) and several hold a folder of one name. They may be when
    only their names say so, or when they hold nearly the same folders.
    None: they are classes; what lies in them are dates, holders or parts, or nothing.
    """
    inside = {name: found for name, one in folders.items() if (found := skip_lone(one, name))[1].folders}
    inner = {name: {make_label(one).casefold() for one in place.folders} for name, (_, place) in inside.items()}
    counts = Counter(one for names in inner.values() for one in names)
    are_named = len(folders) > 1 and are_groups(folders)
    if not counts or _say_nothing(counts, inner) or not (are_named or (len(inner) > 1 and len(counts) > 1)):
        return None
    usual = {one for one, number in counts.items() if 2 * number > len(inner)}
    shared = [len(names & usual) for names in inner.values()]
    are_alike = all(2 * n >= max(len(names), len(usual), 1) for n, names in zip(shared, inner.values(), strict=True))
    is_sure = are_named and len(counts) > 1 and (max(counts.values()) > 1 or are_parts(folders))
    num_loose = sum(one.num_here for one in folders.values())
    are_mostly_inside = are_groups(inner) or 10 * num_loose <= sum(one.num_all for one in folders.values())
    if not are_named and not (are_alike and are_mostly_inside):
        return None
    ways = {name: way for name, (way, _) in inside.items()}
    return Groups(ways, is_sure, sorted({one for _, place in inside.values() for one in place.folders}))


def are_bare(folders: Mapping[str, Folder]) -> bool:
    """Say whether folders are parts of a data set without class folders in them: `fold_1`, `images_002/images`."""
    return are_parts(folders) and not any(skip_lone(one, name)[1].folders for name, one in folders.items())


def _say_nothing(inside: Collection[str], tops: Collection[str]) -> bool:
    """Say whether folders inside others name no class: dates, holders of images, or sites in folders that are none."""
    are_sites = are_groups(inside) and not are_groups(tops)
    return all(map(is_date, inside)) or all(map(is_holder, inside)) or are_sites


def find_flat_splits(paths: Sequence[str]) -> dict[str, str]:
    """Return the split folders (their paths with a `/` at the end) and their sides, when there are no other folders.

    What lies around them is passed through. {} when there is another folder at the top.
    """
    small = set(find_small_copies(paths))
    prefix, folder = pass_wrappers(make_tree(leave_out(paths, small)), "")
    sides = find_sides(folder)
    known = {f"{prefix}{name}/": side for name, side in sides.items() if side}
    return known if known and all(sides[name] or has_no_labels(name) for name in sides) else {}
