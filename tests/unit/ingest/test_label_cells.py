"""What label cells mean as a whole: several labels in one cell, or a name with a mark; cells without a label."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from source_runs import Run, run_source, touch
from visionloop.errors import SourceError


def run(home: Path, cells: Sequence[Any], **section: Any) -> Run:
    """Read a table with one label cell for each image."""
    touch(home, [f"{i}.jpg" for i in range(len(cells))])
    column = section.pop("column", "label")
    rows = [{"file": f"{i}.jpg", column: cell} for i, cell in enumerate(cells)]
    (home / "labels.json").write_text(json.dumps(rows))
    return run_source(home, **{"kind": "table", "path": "labels.json", **section})


def labels(found: Run) -> list[tuple[str, ...]]:
    return [item.labels for item in found.items]


CATS_AND_DOGS = ("cat", "dog", "cat", "dog")
MARKS = [",", ", ", "/", "|", ";", " + ", " & ", ":", "\n", "\t", "、", "\uff0c", " and ", " ", "_", "-"]


@pytest.mark.parametrize("mark", MARKS)
def test_labels_of_other_rows_in_one_cell_are_asked_about(tmp_path: Path, mark: str) -> None:
    cells = (*CATS_AND_DOGS, f"cat{mark}dog")
    with pytest.raises(SourceError, match="'cat', 'dog' are labels of other rows") as caught:
        run(tmp_path, cells)
    assert "--separator none` for one class as written" in str(caught.value)
    assert labels(run(tmp_path, cells, several=True))[4] == ("cat", "dog")
    written = run(tmp_path, cells, columns={"separator": "none"})
    assert len(written.items) + len(written.rejected) == 5
    assert {one.code for one in written.rejected} <= {"bad_label"}  # a line's end or a tab is in no class
    assert [item.labels for item in written.items[4:]] in ([], [(f"cat{mark}dog",)])


@pytest.mark.parametrize(
    "cells",
    [
        ["cat,dog", "dog,bird", "bird,cat", "cat,bird,dog"],  # in any order, none alone
        ["bird,cat", "bird,dog", "cat,dog", "bird,cat,dog"],  # sorted
        ["a|b|c", "b|c", "a|c", "c|d"],
        ["cat,dog", "cat,dog,cow,pig", "dog,cat,cow", "cat", "dog", "cow"],  # most of the parts are labels, not all
        ["Cat", "DOG", "cat , dog"],
    ],
)
def test_cells_that_are_sets_are_asked_about(tmp_path: Path, cells: list[str]) -> None:
    with pytest.raises(SourceError, match=r"column label can be read in two ways: .* may be several labels"):
        run(tmp_path, cells)
    assert {label for one in labels(run(tmp_path, cells, several=True)) for label in one} <= {
        *("cat", "dog", "bird", "a", "b", "c", "d", "cow", "pig", "Cat", "DOG")
    }


PLANET = ["haze primary", "agriculture clear primary water", "clear primary", "cloudy", "haze primary water"]


@pytest.mark.parametrize("column", ["tags", "labels"])
def test_words_between_spaces_are_tags_in_a_column_of_that_name(tmp_path: Path, column: str) -> None:
    with pytest.raises(SourceError, match=r"--separator ' '` in a workspace with `task: multilabel`"):
        run(tmp_path, PLANET, column=column)
    found = labels(run(tmp_path, PLANET, column=column, several=True))
    assert found[1] == ("agriculture", "clear", "primary", "water")
    assert labels(run(tmp_path, PLANET, column="scene"))[0] == ("haze primary",)


@pytest.mark.parametrize(
    "cells",
    [
        ["Tomato/healthy", "Tomato/blight", "Potato/healthy", "Potato/blight", "Corn/rust"],
        ["animal:dog:poodle", "animal:dog:pug", "animal:cat", "plant:tree"],
        ["AT&T", "R&B", "M&M", "Marks & Spencer"],
        ["salt & pepper", "sugar & salt", "pepper"],
        ["O'Hare, Chicago", "Midway, Chicago", "Chicago", "JFK, New York", "LaGuardia, New York"],
        ["tabby, tabby cat", "tiger cat", "Persian cat", "tench, Tinca tinca"],
        ["C++", "C", "C#", "A+", "A"],
        ["golden retriever", "labrador retriever", "pug", "hot dog", "dog"],
        ["black bear", "American black bear", "polar bear", "bear"],
        ["Apple black rot", "Grape black rot", "Apple healthy", "Cedar apple rust", "Grape healthy"],
        ["10-20", "20-30", "30+", "1/2", "1:30"],
        ["pickup_truck", "truck", "dump_truck"],
        ["a,", ",b", "c;;"],
    ],
)
@pytest.mark.parametrize("column", ["label", "tags"])
def test_a_mark_in_a_name_is_a_name(tmp_path: Path, cells: list[str], column: str) -> None:
    assert labels(run(tmp_path, cells, column=column)) == [(cell,) for cell in cells]


def test_a_separator_that_is_told_divides_and_asks_nothing(tmp_path: Path) -> None:
    cells = ["Tomato/healthy", "cat|dog", "cat", "dog"]
    found = run(tmp_path, cells, columns={"separator": "/"})
    assert labels(found) == [("Tomato", "healthy"), ("cat|dog",), ("cat",), ("dog",)]


def test_the_whole_table_is_looked_at_and_lists_are_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"'cat,dog' \(1 rows\)"):
        run(tmp_path, ["cat"] * 300 + ["dog"] * 300 + ["cat,dog"])
    lists = [["cat", "dog"], ["dog"], ["bird"]]
    assert labels(run(tmp_path, lists)) == [("cat", "dog"), ("dog",), ("bird",)]


def test_hostile_cells_cost_nothing(tmp_path: Path) -> None:
    cells = ["," * 5000, "\x1b[2J,x", "a" * 5000 + ",b", {"a": 1}, [["x"]], None, 7, "x", "y"]
    found = run(tmp_path, cells, columns={"label": "label"})
    assert labels(found) == [(), ("7",), ("x",), ("y",)]
    assert {one.code for one in found.rejected} == {"bad_label", "bad_row"}


# Cells without a label


EMPTY = ["nan", "NA", "None", "null", "N/A", "-", "", "NaN", "#N/A", "<NA>", "NULL", " n/a ", "?"]


@pytest.mark.parametrize("text", EMPTY)
def test_a_few_cells_without_a_label_are_no_class(tmp_path: Path, text: str) -> None:
    found = run(tmp_path, [*"cdcdcdcdcd", text])
    assert labels(found)[10:] == [()]
    assert any("rows without a label, for prediction only: 1" in line for line in found.told)
    if text:
        assert any(f"{text.strip()!r} in 1" in line and "--no-label ''" in line for line in found.told)
        kept = run(tmp_path, [*"cdcdcdcdcd", text], columns={"no_label": [""]})
        assert labels(kept)[10:] == [(text.strip(),)]


@pytest.mark.parametrize("cells", [["None"] * 3, ["NA", "nan", "NA"]])
def test_labels_that_are_all_such_texts_are_classes(tmp_path: Path, cells: list[str]) -> None:
    assert labels(run(tmp_path, cells)) == [(cell,) for cell in cells]


@pytest.mark.parametrize(
    "cells",
    [
        ["None", "Some"] * 5,
        ["Some"] * 9 + ["None"],
        ["none"] * 4 + ["mild"] * 4 + ["severe"] * 4,
        ["NA"] * 40 + ["b", "c"],
    ],
)
def test_a_text_that_may_be_a_class_is_asked_about(tmp_path: Path, cells: list[str]) -> None:
    with pytest.raises(SourceError, match=r"rows, which may be a class or no label; .*--no-label") as caught:
        run(tmp_path, cells)
    word = next(cell for cell in cells if cell.lower() in ("none", "na"))
    assert f"--no-label {word}` for rows without a label" in str(caught.value)
    assert () in labels(run(tmp_path, cells, columns={"no_label": [word.upper()]}))
    assert () not in labels(run(tmp_path, cells, columns={"no_label": [""]}))


def test_texts_that_say_nothing_are_left_out_of_several_labels(tmp_path: Path) -> None:
    found = run(tmp_path, ["a|b", "b|NA", "a", "b", "b|a", "nan"], columns={"separator": "|"}, several=True)
    assert labels(found) == [("a", "b"), ("b",), ("a",), ("b",), ("b", "a"), ()]


def test_a_group_that_says_nothing_is_no_group(tmp_path: Path) -> None:
    touch(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    (tmp_path / "labels.csv").write_text("file,label,patient_id\n1.jpg,a,NA\n2.jpg,b,nan\n3.jpg,b,p1\n")
    assert [item.group for item in run_source(tmp_path, kind="table", path=".").items] == [None, None, "p1"]
