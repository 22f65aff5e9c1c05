"""Split columns of numbers: read where their name and numbers are those of a well-known data set, else asked about."""

from pathlib import Path
from typing import Any

import pytest

from source_runs import Run, run_source, touch
from visionloop.errors import SourceError


def run(home: Path, table: str, *paths: str, **section: Any) -> Run:
    touch(home / "data", paths or [f"{i}.jpg" for i in range(1, 7)])
    (home / "data" / "labels.csv").write_text(table)
    return run_source(home, **{"kind": "table", "path": "data", **section})


def sides(found: Run) -> list[tuple[str, str | None]]:
    return [
        (item.origin.partition(":")[2], "learn" if item.test_is_given and not item.side else item.side)
        for item in found.items
    ]


@pytest.mark.parametrize(
    ("header", "cells", "expected"),
    [
        ("split", "001122", ["train", "train", "val", "val", "test", "test"]),  # Waterbirds
        ("partition", "000012", ["train", "train", "train", "train", "val", "test"]),  # CelebA
        ("train_test_split", "110011", ["learn", "learn", "test", "test", "learn", "learn"]),  # CUB
        ("is_training_image", "110011", ["learn", "learn", "test", "test", "learn", "learn"]),
    ],
)
def test_numbers_of_well_known_data_sets_are_sides(
    tmp_path: Path, header: str, cells: str, expected: list[str]
) -> None:
    rows = "".join(f"{i}.jpg,{'ab'[i % 2]},{cell}\n" for i, cell in enumerate(cells, start=1))
    found = run(tmp_path, f"file,y,{header}\n{rows}")
    assert [side for _, side in sides(found)] == expected
    assert f"side = {header}" in found.told[0]


def test_numbers_of_a_sorted_table_are_looked_at_in_all_rows(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(260)]
    rows = "".join(f"{name},{'ab'[i % 2]},{(i > 250) + (i > 255)}\n" for i, name in enumerate(names))
    assert [side for _, side in sides(run(tmp_path, f"file,y,partition\n{rows}", *names))][250:252] == ["train", "val"]


@pytest.mark.parametrize(("header", "cells"), [("subset", "0101"), ("split", "0101"), ("data_split", "0122")])
def test_numbers_that_may_be_sides_are_asked_about(tmp_path: Path, header: str, cells: str) -> None:
    rows = "".join(f"{i}.jpg,cat,{cell}\n" for i, cell in enumerate(cells, start=1))
    names = [f"{i}.jpg" for i in range(1, 5)]
    with pytest.raises(SourceError, match=rf"column {header} holds 0, 1.*, which may be sides or no split; .*--sides"):
        run(tmp_path, f"file,label,{header}\n{rows}", *names)
    told = run(tmp_path, f"file,label,{header}\n{rows}", *names, columns={"sides": ["test", "train", "val"]})
    assert sides(told)[0][1] == "test"
    without = run(tmp_path, f"file,label,{header}\n{rows}", *names, columns={"sides": []})
    assert {side for _, side in sides(without)} == {None}
    assert any(f"column {header} is not used as the split" in line for line in without.told)
