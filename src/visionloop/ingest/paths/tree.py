"""Images by the folders they lie in: what lies around everything, and which folders are splits. Pure."""

from collections import Counter
from collections.abc import Collection, Sequence

from visionloop.ingest.paths.names import find_side, has_no_labels, is_date, is_holder, split_name

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
    loose = {name: split_name(name) for name in folder.folders}
    others = {name for name in sides if not has_no_labels(name)}
    rests = {loose[name][1] for name in others if not sides[name]}
    if len(others) > 1 and all(loose[name][0] for name in others) and (len(rests) < 2 or _share_names(folder, others)):
        return {name: loose[name][0] for name in sides}
    return sides


def _share_names(folder: Folder, names: Collection[str]) -> bool:
    """Say whether all these folders hold folders of the same names, or most of them."""
    inside = [set(skip_lone(folder.folders[name], name)[1].folders) for name in names]
    common = set.intersection(*inside) if inside else set()
    return bool(common) and 2 * len(common) >= max(map(len, inside))


def skip_lone(folder: Folder, name: str, known: Collection[str] = ()) -> tuple[str, Folder]:
    """Go into the lone folder inside a split folder `name`, unless it is a class; return the way and the folder."""
    way = ""
    while lone := folder.lone():
        inside = folder.folders[lone]
        says_nothing = is_holder(lone) or find_side(lone) or split_name(lone)[0] or lone.lower() == name.lower()
        if lone in known or not (says_nothing or len(inside.folders) > 1):
            break
        way, folder = f"{way}{lone}/", inside
    return way, folder


def find_flat_splits(paths: Sequence[str]) -> dict[str, str]:
    """Return the split folders (their paths with a `/` at the end) and their sides, when there are no other folders.

    What lies around them is passed through. {} when there is another folder at the top.
    """
    prefix, folder = pass_wrappers(make_tree(paths), "")
    sides = find_sides(folder)
    known = {f"{prefix}{name}/": side for name, side in sides.items() if side}
    return known if known and all(sides[name] or has_no_labels(name) for name in sides) else {}
