"""What every source yields."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """One labelled file. `origin` is stable across machines: the source's name and the path inside it.

    `side` is the source's own split (train, val, test) or None. `test_is_given`: the source has its own test folder,
    so that this image may only be divided between train and val.
    """

    path: Path
    origin: str
    source: str
    labels: tuple[str, ...]
    ordinal: int
    side: str | None = None
    test_is_given: bool = False
    group: str | None = None
