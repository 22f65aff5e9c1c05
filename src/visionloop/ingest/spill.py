"""Rows that a pull puts down because they are too many to hold: in a file of the workspace that has no name.

Such a file is gone with its process, however that ends. A small pull needs none: the last rows stay in memory. Of what
must be seen of all images at once a few numbers are held (`Crowd`). Dimension in names: n images.
"""

import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.errors import DiskError
from visionloop.records import SIDES

RUN_ROWS = 16_384  # that are held to be sorted and put down together: about 15 MB
PLAIN_ROWS = 1_024  # the same of what is not sorted
BLOCK_ROWS = 64  # that are read together; of each sorted run so many are in memory
# A side in three bits (0: none yet), and marks of an image: it may be train or val alone, `excluded_near_test` as in
# `Item`, it has a perceptual hash, it comes behind others of the same ordinal.
NAMES = ("", *SIDES)
SIDE, LEARN, NEAR_TEST, HAS_HASH, IS_LATE = 7, 8, 16, 32, 64

Row = tuple[Any, ...]


class Spill:
    """Rows in the order in which they were added or, if `is_sorted`, in their own; they may be read again and again.

    The first values of sorted rows must tell any two apart. Raises DiskError, also while it is read.
    """

    # Example: RUN_ROWS = 4, BLOCK_ROWS = 2, is_sorted, and the rows 5 3 8 1 9 2 are added.
    #
    #   in the file    one run, sorted, in two blocks: [1 3] [5 8]        held: 9 2
    #   read           1 and 3 of the first block, 2 of those held, and so on: 1 2 3 5 8 9
    #
    # What is not sorted is the same with the runs one behind the other.
    def __init__(self, folder: Path, *, is_sorted: bool = False) -> None:
        self.folder = folder
        self._is_sorted, self._run_rows = is_sorted, RUN_ROWS if is_sorted else PLAIN_ROWS
        self._held: list[Row] = []
        self._runs: list[list[tuple[int, int]]] = []  # of each block where it begins, and how many bytes it has
        self._num_rows = self._num_bytes = 0
        self._file = -1

    def add(self, row: Row) -> None:
        """Add a row."""
        self._held.append(row)
        self._num_rows += 1
        if len(self._held) >= self._run_rows:
            self._put_down()

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Row]:
        runs = [chain.from_iterable(map(self._read, run)) for run in self._runs]
        return merge(*runs, sorted(self._held)) if self._is_sorted else chain(*runs, self._held)

    def pick(self, places: Sequence[int]) -> Iterator[Row]:
        """Yield the rows at some places, in order, of what is not sorted; the first row is at 0."""
        size = self._run_rows
        for (number, block), some in groupby(places, lambda p: (p // size, p % size // BLOCK_ROWS)):
            is_held = number == len(self._runs)
            rows = self._held if is_held else self._read(self._runs[number][block])
            start = number * size + (0 if is_held else block * BLOCK_ROWS)
            yield from (rows[place - start] for place in some)

    def _put_down(self) -> None:
        if self._is_sorted:
            self._held.sort()
        blocks = [pickle.dumps(self._held[i : i + BLOCK_ROWS]) for i in range(0, len(self._held), BLOCK_ROWS)]
        run = []
        for block in blocks:
            run.append((self._num_bytes, len(block)))
            self._num_bytes += len(block)
        self._write(b"".join(blocks))
        self._runs.append(run)
        self._held = []

    def _write(self, data: bytes) -> None:
        try:
            if self._file < 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder) as file:
                    self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as exc:
            raise self._make_error("written", exc) from exc

    def _read(self, block: tuple[int, int]) -> list[Row]:
        start, size = block
        try:
            data = os.pread(self._file, size, start)
        except OSError as exc:
            raise self._make_error("read", exc) from exc
        rows: list[Row] = pickle.loads(data)
        return rows

    def _make_error(self, done: str, exc: OSError) -> DiskError:
        return DiskError(
            f"{self.folder}",
            f"cannot be {done} ({exc.strerror})",
            "room for what a pull finds, about 1 GB for each million images",
            "Make room, or make the folder writable, and run the same again: what is stored is not stored again.",
        )


class Crowd:
    """Images of which all must be seen at once: a few numbers of each as columns, and their rows, which are put down.

    The first values of a row are those of the manifest. Places are in the order in which images were added.
    """

    def __init__(self, folder: Path, groups: dict[str, int]) -> None:
        self.rows = Spill(folder)
        self.label_sets: dict[tuple[str, ...], int] = {}
        self.groups = groups  # numbers of all groups, shared by crowds
        self._hashes, self._ordinals, self._marks = array("Q"), array("q"), array("B")
        self._label_numbers, self._group_numbers = array("i"), array("i")

    def add(self, row: Row, side: str | None, *, mark: int = 0) -> None:
        """Add an image with its side, if it has one, and with marks."""
        labels, ordinal, group, phash = row[1], row[4], row[5], row[13]
        self.rows.add(row)
        self._hashes.append(int(phash or "0", 16))
        self._ordinals.append(ordinal)
        self._marks.append(NAMES.index(side or "") | mark | (HAS_HASH if phash else 0))
        self._label_numbers.append(self.label_sets.setdefault(labels, len(self.label_sets)))
        self._group_numbers.append(-1 if group is None else self.groups.setdefault(group, len(self.groups)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def hash_n(self) -> NDArray[np.uint64]:
        """The perceptual hashes; 0 where there is none."""
        return np.frombuffer(self._hashes, np.uint64)

    @property
    def mark_n(self) -> NDArray[np.uint8]:
        """The sides and marks."""
        return np.frombuffer(self._marks, np.uint8)

    @property
    def label_n(self) -> NDArray[np.int32]:
        """The numbers of the sets of labels."""
        return np.frombuffer(self._label_numbers, np.int32)

    @property
    def group_n(self) -> NDArray[np.int32]:
        """The numbers of the groups; -1: none."""
        return np.frombuffer(self._group_numbers, np.int32)

    def sort(self) -> NDArray[np.int32]:
        """Return the places in the order of their ordinals."""
        order = np.lexsort((self.mark_n & IS_LATE, np.frombuffer(self._ordinals, np.int64)))
        return order.astype(np.int32)
