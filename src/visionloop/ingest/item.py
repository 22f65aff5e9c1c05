"""What every source yields, and what it is given."""

import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from visionloop.data.foreign import RAW_SUFFIXES
from visionloop.errors import ImageError
from visionloop.params import Ingest

if TYPE_CHECKING:
    from visionloop.data.acceptance import Answered

SHOWN_SUFFIXES, SHOWN_LINKS = 10, 5


class Item(NamedTuple):
    """One image that a source offers. The order of items is the order that the dataset keeps (`ordinal`).

    `origin` is stable across machines: the source's name, a colon, the place inside it. `read(max_bytes)` returns the
    encoded bytes; it is called in another thread, once at most, and raises ImageError when they cannot be had, or are
    more than that.
    `stamp` changes when the bytes may have changed (size, mtime and inode; an ETag): with the same stamp the bytes are
    not read again. None: always read. `labels` is empty for an image that is for prediction only.

    `side` is the source's own split (train, val, test) or None. `test_is_given`: the source has its own test folder,
    so that this image may only be divided between train and val. `excluded_near_test`: that is a rule of ours, not the
    source's word, so that near a test image it is excluded. `captured_at` is ISO 8601.
    """

    origin: str
    source: str
    labels: tuple[str, ...]
    read: Callable[[int], bytes]
    stamp: str | None = None
    side: str | None = None
    test_is_given: bool = False
    group: str | None = None
    captured_at: str | None = None
    excluded_near_test: bool = False


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far an incremental source was read. It is committed together with the version that holds those images."""

    source: str
    value: str


@dataclass
class PassedOver:
    """How many files of a source are neither offered nor rejected. A source yields one, at its end.

    `files` are counted by the folder they lie in (its path with a `/` at the end, or "") and their suffix (`hidden`,
    `no suffix`). `folders` are hidden ones and those that systems make (`@eaDir`), by where they lie and their name:
    the files in them. `links` are links to folders, each with what was done with it. `empty` are folders without
    anything in them.
    """

    files: Counter[tuple[str, str]] = field(default_factory=Counter)
    folders: Counter[tuple[str, str]] = field(default_factory=Counter)
    links: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)

    def add_file(self, folder: str, suffix: str) -> None:
        """Count a file that is passed over."""
        self.files[folder, suffix] += 1

    def add_folder(self, folder: str, name: str, num_files: int) -> None:
        """Count the files in a folder that is passed over as a whole."""
        self.folders[folder, name] += num_files

    @property
    def num_files(self) -> int:
        """How many files they are in all."""
        return self.files.total() + self.folders.total()

    def describe_links(self) -> str:
        """Return which links to folders were followed, and which not and why; or ""."""
        shown = [f"{link} {what}" for link, what in sorted(self.links.items())]
        more = f" and {len(shown) - SHOWN_LINKS:,} more" if len(shown) > SHOWN_LINKS else ""
        return f"links to folders: {'; '.join(shown[:SHOWN_LINKS])}{more}" if shown else ""

    def describe(self) -> str:
        """Return the counts by suffix and by folder, the largest first: `.txt 12, hidden 1; in @eaDir 40`; or ""."""
        suffixes, names = Counter[str](), Counter[str]()
        for (_, suffix), number in self.files.items():
            suffixes[suffix] += number
        for (_, name), number in self.folders.items():
            names[name] += number
        texts = []
        for counts, before in ((suffixes, ""), (names, "in ")):
            ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
            shown = [
                f"{before}{name} {number:,}{' (RAW: export as JPEG or PNG)' if name in RAW_SUFFIXES else ''}"
                for name, number in ranked[:SHOWN_SUFFIXES]
            ]
            if more := ranked[SHOWN_SUFFIXES:]:
                shown.append(f"{before}{len(more):,} others {sum(number for _, number in more):,}")
            texts += [", ".join(shown)] if shown else []
        return "; ".join(texts)


@dataclass(frozen=True)
class SourceContext:
    """What a source is given: the workspace, the environment, its last cursor, and a way to tell the user something.

    `several`: an image may have several labels (`task: multilabel`). `answered`: what people said of images; None where
    no source asks for it.
    """

    home: Path
    hidden_dir: Path
    env: Mapping[str, str]
    limits: Ingest = field(default_factory=Ingest)
    cursor: str | None = None
    tell: Callable[[str], None] = lambda line: None
    several: bool = False
    answered: "Answered | None" = None

    def resolve(self, path: str) -> Path:
        """Return a path of params.yaml as an absolute one; relative to the workspace."""
        return (self.home / Path(path).expanduser()).resolve()


def make_file_reader(path: str) -> Callable[[int], bytes]:
    """Return the `read` of an item that is a file."""
    return partial(read_file, path)


def read_file(path: str, max_bytes: int) -> bytes:
    """Return the bytes of a file, if they are no more than `max_bytes`. Raises ImageError.

    Only a regular file, or a link to one, is read: a pipe would wait for a writer, a device would never end.
    """
    try:
        # Not open(): it makes three more system calls, and waits at a pipe.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode):
                raise ImageError(path, "is not a regular file", "a file", reason_code="unreadable")
            data = b"" if facts.st_size > max_bytes else _read_whole(file, facts.st_size, max_bytes)
        finally:
            os.close(file)
    except OSError as exc:
        raise ImageError(path, f"cannot be read ({exc.strerror})", "a file", reason_code="unreadable") from exc
    if max(facts.st_size, len(data)) > max_bytes:
        raise ImageError(path, "is too large", f"at most {max_bytes} bytes", reason_code="too_large")
    return data


def _read_whole(file: int, size: int, max_bytes: int) -> bytes:
    """Read to the end, or one byte beyond `max_bytes`; in one call if the size has not changed."""
    data = os.read(file, size + 1)
    if len(data) == size:
        return data
    parts = [data]
    while (left := max_bytes + 1 - sum(map(len, parts))) > 0 and (more := os.read(file, left)):
        parts.append(more)
    return b"".join(parts)
