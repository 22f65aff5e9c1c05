"""corrections.csv: what is read, what is refused with its line, and that a second time changes nothing."""

from pathlib import Path

import pytest

from visionloop.errors import SourceError
from visionloop.ingest.labels import Correction, Labels, load_corrections, match_corrections

A, B, C = "a1" * 32, "a1" * 31 + "ff", "c3" * 32
NONE: frozenset[str] = frozenset()


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "corrections.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def correct(line: Correction, labels: Labels, *, several: bool = False) -> Labels:
    matched = match_corrections([line], {A: [labels]}, NONE, several=several)
    for one in matched[A]:
        labels = one.apply(labels, several=several)
    return labels


def test_a_file_with_a_mark_quotes_and_columns_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeffnew,sha256,old,why\r\n"dog, big",C3C3C3C3,cat,seen\r\n,a1a1a1a1a1,cat,\r\n')
    assert load_corrections(path) == [
        Correction(2, "c3c3c3c3", "cat", "dog, big"),
        Correction(3, "a1a1a1a1a1", "cat", ""),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: has no column new, old, sha256 among none; expected sha256, old, new\. Name them"),
        ("sha,old,new\n", r"line 1: has no column sha256 among new, old, sha"),
        ("sha256,old,new\na1a1a1a,cat,dog\n", r"line 2: has the sha256 'a1a1a1a'; expected 8 to 64 hexadecimal digits"),
        ("sha256,old,new\n../../../etc,cat,dog\n", r"line 2: has the sha256 '\.\./\.\./\.\./etc'"),
        ("sha256,old,new\n\na1a1a1a1,cat\n", r"line 3: has 2 cells; expected 3, as line 1"),
        ("sha256,old,new\na1a1a1a1,cat,dog, big\n", r"line 2: has 4 cells; .* Quote a label with a comma"),
        ("sha256,old,new\na1a1a1a1,cat,cat\n", r"line 2: changes 'cat' to itself"),
        (b"sha256,old,new\na1a1a1a1,\xff,cat\n", r"is not UTF-8 text"),
        ('sha256,old,new\na1a1a1a1,"cat" x,dog\n', r"line 2: is no CSV"),
        ("sha256,old,new\na1a1a1a1," + "c" * 200_000 + ",dog\n", r"line 2: is no CSV \(field larger than"),
    ],
    ids=["empty", "columns", "short", "path", "cut", "comma", "same", "bytes", "quotes", "huge"],
)
def test_what_is_no_correction_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_corrections(write(tmp_path, text))


def test_a_missing_file_says_where_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing\.csv: cannot be read .*Check ingest\.corrections"):
        load_corrections(tmp_path / "nothing.csv")


def test_one_label_is_replaced_given_or_taken_and_a_second_time_changes_nothing() -> None:
    for line, before, after in (
        (Correction(2, A[:63], "cat", "dog"), ("cat",), ("dog",)),
        (Correction(2, A, "", "dog"), (), ("dog",)),
        (Correction(2, A, "cat", ""), ("cat",), ()),
    ):
        assert correct(line, before) == after
        assert correct(line, after) == after


def test_of_several_labels_one_is_replaced() -> None:
    line = Correction(2, A, "cat", "dog")
    assert correct(line, ("bird", "cat"), several=True) == ("bird", "dog")
    assert correct(line, ("bird", "dog"), several=True) == ("bird", "dog")
    assert correct(Correction(2, A, "", "dog"), ("bird",), several=True) == ("bird", "dog")


def test_lines_that_do_not_fit_are_all_named() -> None:
    lines = [
        Correction(2, "ffffffff", "cat", "dog"),
        Correction(3, "a1a1a1a1", "cat", "dog"),
        Correction(4, C, "cow", "dog"),
        Correction(5, A, "cat", "dog"),
        Correction(6, A, "cat", "cow"),
    ]
    with pytest.raises(SourceError) as caught:
        match_corrections(lines, {A: [("cat",)], B: [()], C: [("cat",)]}, NONE, several=False)
    assert caught.value.found == (
        "line 2: no image has ffffffff; line 3: 2 images begin with a1a1a1a1; "
        "line 4: c3c3c3c3c3c3c3c3 has the label cat, not cow; line 6: a1a1a1a1a1a1a1a1 is corrected in line 5 already"
    )


def test_a_forgotten_image_is_passed_over() -> None:
    assert match_corrections([Correction(2, C, "cat", "dog")], {A: [("cat",)]}, frozenset({C}), several=False) == {}
