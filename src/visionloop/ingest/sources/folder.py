"""A folder per class, with or without split folders above: `cats/1.jpg` or `train/cats/1.jpg`."""

import os
from collections.abc import Iterator
from pathlib import Path

from visionloop.errors import SourceError
from visionloop.ingest.sources.item import Item, Reading, make_file_reader
from visionloop.params import FolderSource

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif"}
)
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "holdout"), "test"),
}


def read_folder(source: FolderSource, reading: Reading) -> Iterator[Item]:
    """Yield the images of a folder in the order of their paths; hidden files and other file types are passed over.

    Where there is `train` and exactly one other split folder, that one is the test side, whatever its name.

    Raises:
        SourceError: the folder is missing, or holds no class folder with an image.
    """
    yield from walk_folder(source.name, reading.resolve(source.path))


def walk_folder(name: str, folder: Path) -> Iterator[Item]:
    """Yield the images of class folders. Raises SourceError."""
    if not folder.is_dir():
        found = "is a file" if folder.is_file() else "does not exist"
        raise SourceError(f"source {name} {folder}", found, "a folder", "Check the path.")
    splits = _find_splits(folder)
    empty = True
    for split_folder, side, test_is_given in splits or [(folder, None, False)]:
        for class_folder in _list_folders(split_folder):
            for path in _walk_images(class_folder):
                empty = False
                origin = f"{name}:{path.relative_to(folder).as_posix()}"
                read = make_file_reader(str(path))
                yield Item(origin, name, (class_folder.name,), read, make_stamp(path), side, test_is_given)
    if empty:
        raise SourceError(
            f"source {name} {folder}",
            "no image in any class folder",
            "CLASS/IMAGE.jpg or train/CLASS/IMAGE.jpg",
            "Put the images of each class into a folder of its name.",
        )


def make_stamp(path: Path) -> str | None:
    """Return what changes when a file does: size, mtime and inode."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}"


def _find_splits(folder: Path) -> list[tuple[Path, str | None, bool]]:
    """Return (folder, side, test is given) of each split folder; empty when these are no split folders."""
    found = {
        child: SPLIT_NAMES[child.name.lower()] for child in _list_folders(folder) if child.name.lower() in SPLIT_NAMES
    }
    if not found or not any(_list_folders(child) for child in found):
        return []
    held_out = [child for child, side in found.items() if side != "train"]
    if "train" in found.values() and len(held_out) == 1:
        return [(child, "test" if child in held_out else None, child not in held_out) for child in found]
    has_val, has_test = "val" in found.values(), "test" in found.values()
    # Without a held-out folder for validation, it is carved out of train; a lone `train` gives up all three sides.
    return [(child, None if side == "train" and not has_val else side, has_test) for child, side in found.items()]


def _list_folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _walk_images(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and Path(file).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(root, file)
