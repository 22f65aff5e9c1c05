"""scikit-learn's handwritten digits as PNG files in class folders: real images that need no network.

1,797 grey images of 8 x 8 pixels, 10 classes (E. Alpaydin and C. Kaynak, UCI, 1998; CC BY 4.0).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from visionloop.ingest.sources.folder import read_folder
from visionloop.ingest.sources.item import Item, Reading
from visionloop.params import DigitsSource, FolderSource
from visionloop.records import Rejected


def read_digits(source: DigitsSource, reading: Reading) -> Iterator[Item | Rejected]:
    """Write the digits into class folders of the workspace's hidden folder, once, and yield them."""
    folder = reading.hidden_dir / "sources" / "digits"
    if not folder.is_dir():
        _write_digits(folder)
    yield from read_folder(FolderSource(kind="folder", path=str(folder), name=source.name), reading)


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    staged = folder.with_name(f".{folder.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    digits = load_digits()
    for number, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = staged / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((values * (255 / 16)).round().astype("uint8")).save(path)
    staged.rename(folder)
