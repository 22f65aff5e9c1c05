"""One image in the form that a caller has: a path, bytes, an image of Pillow, an array. Reads files, no addresses."""

import os
import stat
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visionloop.data.images import UInt8Array, convert_image, load_array, make_image
from visionloop.errors import ImageError
from visionloop.records import MAX_PIXELS

ImageInput = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any]
FORMS = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
EXPECTED = "a path, bytes, an image of Pillow, or a numpy array"


def load_input(
    image: ImageInput, where: str, *, size_hw: tuple[int, int], resize: str, max_pixels: int = MAX_PIXELS
) -> UInt8Array:
    """Turn an image in any form into (height, width, 3), as `load_array` does for bytes.

    `where` names an image that is no path, for messages. Raises ImageError, also where a file cannot be read.
    """
    if isinstance(image, np.ndarray):
        image = make_image(image, where)
    if isinstance(image, Image.Image):
        return convert_image(image, where, size_hw=size_hw, resize=resize, max_pixels=max_pixels)
    if isinstance(image, str | os.PathLike):
        where = os.fsdecode(image)
        image = read_image_file(where)
    if not isinstance(image, bytes | bytearray | memoryview):
        raise ImageError(where, f"is {_name_type(image)}", EXPECTED, _advise(image))
    return load_array(bytes(image), where, size_hw=size_hw, resize=resize, max_pixels=max_pixels)


def is_one_image(images: object) -> bool:
    """Say whether this is one image, or nothing that could hold images, and not a list of images."""
    # Pillow's images first: the next question would decode them.
    if isinstance(images, (*FORMS, Mapping, Set)):  # a set says not which answer is whose
        return True
    if isinstance(images, np.ndarray) or hasattr(images, "__array_interface__"):
        return getattr(images, "ndim", 0) not in (1, 4)
    return hasattr(images, "read") or not hasattr(images, "__iter__")


def read_image_file(path: str) -> bytes:
    """Return the bytes of a regular file. Raises ImageError."""
    place, where = os.path.expanduser(path), path or "image ''"
    try:
        if not stat.S_ISREG(os.stat(place).st_mode):  # a pipe could keep us waiting for ever
            found, todo = ("is a folder", "List its files.") if os.path.isdir(place) else ("is no file", "")
            raise ImageError(where, found, "an image file", todo, reason_code="unreadable")
        with open(place, "rb") as file:
            return file.read()
    except (OSError, ValueError) as exc:
        if isinstance(exc, ImageError):
            raise
        todo = "Fetch it, and pass its bytes." if "://" in path else ""
        reason = exc.strerror if isinstance(exc, OSError) else exc  # ValueError: a null byte in the path
        raise ImageError(where, f"cannot be read ({reason})", "an image file", todo, reason_code="unreadable") from exc


def _name_type(value: object) -> str:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return "None" if value is None else f"of type {name}"


def _advise(value: object) -> str:
    if hasattr(value, "read"):
        return "Pass its bytes: `file.read()`."
    return "Turn it into an array of uint8, height x width x 3." if hasattr(value, "__array__") else ""
