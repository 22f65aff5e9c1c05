"""What the names of files, folders and classes mean: image suffixes, splits, labels. Pure."""

from collections.abc import Mapping
from types import MappingProxyType

VIDEO_SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob"),
        *(".flv", ".ogv", ".ogg", ".3gp", ".3g2"),
    )
)
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif"}
)
SPLIT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("train", "training"), "train"),
        **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
        **dict.fromkeys(("test", "testing", "eval", "holdout"), "test"),
    }
)
# Folders beside a table: where its images lie, most likely first, and where images without labels do.
IMAGE_FOLDERS = ("train", "images", "train_images", "image", "imgs", "img", "photos", "data")
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled")
MAX_LABEL = 256


def find_side(name: str) -> str | None:
    """Return train, val or test for the name of a split (`Training`, `val2017`, `test1`); None for any other name."""
    lower = name.strip().lower()
    return SPLIT_NAMES.get(lower) or SPLIT_NAMES.get(lower.rstrip("0123456789"))


def is_image_name(name: str) -> bool:
    """Say whether a file's suffix is one of an image, and it is not hidden."""
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def is_label(text: str) -> bool:
    """Say whether a text can be a class: 1 to 256 printable characters, none of white space around them."""
    return 0 < len(text) <= MAX_LABEL and text.isprintable() and text == text.strip()


def escape_name(name: str) -> str:
    """Return a file's name as text of one line that can be stored: what is not printable is escaped."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
