"""Every file is in exactly one of: image taken, quarantined, listed, passed over. The sum, and the limit on the bad."""

import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import make_image, write_photos
from visionloop.errors import SourceError
from visionloop.ingest.labels import describe_twins, make_label_rules
from visionloop.ingest.pull import PullReport, pull
from visionloop.ingest.sources.guess import guess_source
from visionloop.params import make_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.words import describe_pull
from visionloop.workspace import connect
from workspaces import NOW

IMAGES = [make_image(i) for i in range(40)]


def pull_path(home: Path, place: Path, **ingest: Any) -> PullReport:
    home.mkdir(exist_ok=True)
    (home / "params.yaml").write_text("name: pets\n")
    params = make_params({"name": "pets", "ingest": {"max_rejected_ratio": 1.0, **ingest}})
    workspace = connect(load_settings({}, home), params, store=LocalStore(home / "store"))
    return pull(workspace, sources=[guess_source(str(place), "photos")], now=NOW)


def count_files(place: Path) -> int:
    return sum(path.is_file() or path.is_symlink() for path in place.rglob("*"))


def write(place: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return place


NAMES = ("a.png", "b.PNG", "c.jpg", "d.txt", "e", ".f", "g.xml", "h.jpg_large", "i.jp2", "Thumbs.db", "j.png.json")
FOLDERS = ("cat", "dog", "cat/x", "@eaDir", "dog/.hidden", "test", "train", "#recycle", "", "other/deep")
PLACES = st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), max_size=25)
ROWS = st.lists(
    st.tuples(st.sampled_from(("a", "b.PNG", "cat/c.jpg", "gone.png", "", "../x.png", "1.png", "2.PNG")),
              st.sampled_from(("cat", "dog", "x" * 300, "")), st.sampled_from(("train", "test", "odd", ""))),
    max_size=12,
)  # fmt: skip


@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=PLACES, rows=st.none() | ROWS, bad=st.sets(st.integers(0, 24)))
def test_every_file_of_a_random_tree_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory,
    places: set[tuple[str, str]],
    rows: list[tuple[str, str, str]] | None,
    bad: set[int],
) -> None:
    home = tmp_path_factory.mktemp("t")
    images = itertools.cycle(IMAGES)
    # At least two classes, in class folders or in a table, or nothing is taken at all.
    files: dict[str, bytes | str] = {}
    for number, (folder, name) in enumerate(sorted(places)):
        data = b"broken" if number in bad else next(images)
        files[f"{folder}/{name}" if folder else name] = data
    if rows is None:
        files |= {"cat/first.png": IMAGES[38], "dog/first.png": IMAGES[39]}
    else:
        files |= {"1.png": IMAGES[38], "2.png": IMAGES[39]}
        body = "".join(f"{file},{label},{split}\n" for file, label, split in rows)
        files["labels.csv"] = f"file,label,split\n1.png,cat,train\n2.png,dog,train\n{body}"
    place = write(home / "photos", files)
    try:
        report = pull_path(home / "ws", place)
    except SourceError as exc:  # fewer than two classes are left, or it can be read in two ways
        assert "class" in str(exc) or "two ways" in str(exc) or "no image" in str(exc)
        return
    account = report.account
    assert account.num_files == count_files(place), (account, report.rejected)
    origins = {o for one in report.rejected if not one.is_row for o in [one.origin]}
    assert account.quarantined + account.listed == len(origins)
    assert account.rows == dict(sorted(Counter(one.code for one in report.rejected if one.is_row).items()))
    again = pull_path(home / "ws", place)
    assert again.account == account


def test_the_sum_of_a_tree_of_many_kinds(tmp_path: Path) -> None:
    suffixes = [f".k{i}" for i in range(30)]
    files = {f"{'cat' if i % 2 else 'dog'}/{i}{suffixes[i % 30]}": b"x" for i in range(10_000)}
    place = write(write_photos(tmp_path / "photos", 10), files)
    report = pull_path(tmp_path / "ws", place)
    assert report.account.describe() == "sum: 10,020 files = 20 taken, 10,000 passed over"


def test_the_sum_is_printed_also_when_nothing_is_new(tmp_path: Path) -> None:
    place = write_photos(tmp_path / "photos", 10)
    write(place, {"cat/bad.jpg": b"x", "cat/note.txt": "x", "labels.csv.bak": "x"})
    lines = [describe_pull(pull_path(tmp_path / "ws", place)) for _ in range(2)]
    line = "sum: 23 files = 20 taken, 1 quarantined, 2 passed over"
    assert line in lines[0]
    assert line in lines[1]


def test_rows_that_lead_to_no_file_are_counted_apart(tmp_path: Path) -> None:
    place = write(tmp_path / "photos", {f"{i}.png": IMAGES[i] for i in range(6)})
    write(place, {"labels.csv": "file,label\n0.png,a\n1.png,b\n2.png,a\n9.png,a\n../1.png,b\n,b\n"})
    report = pull_path(tmp_path / "ws", place)
    assert report.account.describe() == (
        "sum: 7 files = 3 taken, 3 listed, 1 passed over; and rows: 2 row_without_image, 1 unsafe_path"
    )


# 42, O4: what the summary calls unusable counts for the limit


def test_rows_without_an_image_count_for_the_limit(tmp_path: Path) -> None:
    place = write(tmp_path / "photos", {f"{i}.png": IMAGES[i] for i in range(10)})
    rows = [f"{i}.png,{'ab'[i % 2]}\n" for i in range(10)] + [f"gone{i}.png,a\n" for i in range(6)]
    write(place, {"labels.csv": "file,label\n" + "".join(rows)})
    with pytest.raises(SourceError, match=r"6 of 16 files and rows cannot be used: .*gone0\.png.*expected at most 5%"):
        pull_path(tmp_path / "ws", place, max_rejected_ratio=0.05)
    assert pull_path(tmp_path / "ws", place, max_rejected_ratio=0.5).num_added == 10


@pytest.mark.parametrize("code", ["label_conflict", "several_labels"])
def test_conflicts_and_several_labels_count_for_the_limit(tmp_path: Path, code: str) -> None:
    place = write(tmp_path / "photos", {f"{i}.png": IMAGES[i] for i in range(20)})
    rows = [f"{i}.png,{'ab'[i % 2]}\n" for i in range(20)]
    rows += [f"{i}.png,{'ba'[i % 2]}\n" for i in range(4)] if code == "label_conflict" else []
    several = '"[""a"", ""b""]"'
    if code == "several_labels":
        rows = [f"{i}.png,{several if i < 4 else 'ab'[i % 2]}\n" for i in range(20)]
    write(place, {"labels.csv": "file,label\n" + "".join(rows)})
    with pytest.raises(SourceError, match=rf"of \d+ files cannot be used: photos:0\.png \({code}\)") as caught:
        pull_path(tmp_path / "ws", place, max_rejected_ratio=0.05)
    assert ("task: multilabel" in caught.value.todo) == (code == "several_labels")
    assert not list((tmp_path / "ws").glob("store/datasets/**/*.json"))
    report = pull_path(tmp_path / "ws", place, max_rejected_ratio=0.5)
    assert Counter(one.code for one in report.rejected)[code] >= 4


def test_rows_of_an_unknown_split_are_listed_and_stop_nothing(tmp_path: Path) -> None:
    place = write(tmp_path / "photos", {f"{i}.png": IMAGES[i] for i in range(20)})
    rows = [f"{i}.png,{'ab'[i % 2]},{'UNASSIGNED' if i > 14 else 'test' if i > 9 else 'train'}\n" for i in range(20)]
    write(place, {"labels.csv": "file,label,split\n" + "".join(rows)})
    report = pull_path(tmp_path / "ws", place, max_rejected_ratio=0.05)
    assert sum(report.version.counts["test"].values()) == 5
    assert report.num_added == 15
    assert {one.code for one in report.rejected} == {"unknown_side"}


# O5: what the one class that is left has to do with the rest


def test_one_class_names_the_conflicts_behind_it(tmp_path: Path) -> None:
    place = write_photos(tmp_path / "photos", 6)
    shutil.rmtree(place / "cat")
    (place / "cat").mkdir()
    for path in list((place / "dog").iterdir())[:3]:
        shutil.copy(path, place / "cat")
    with pytest.raises(
        SourceError, match=r"has 1 class \(dog\), and 6 not taken as label_conflict, such as photos:cat/"
    ):
        pull_path(tmp_path / "ws", place)


@pytest.mark.parametrize("code", ["bad_label", "unknown_side", "row_without_image", "not_an_image"])
def test_one_class_names_whatever_is_behind_it(tmp_path: Path, code: str) -> None:
    cells = {
        "bad_label": f"2.png,{'x' * 300},train",
        "unknown_side": "2.png,b,odd",
        "row_without_image": "9.png,b,train",
        "not_an_image": "3.png,b,train",
    }
    place = write(tmp_path / "photos", {"1.png": IMAGES[1], "2.png": IMAGES[2], "3.png": b"x"})
    write(place, {"labels.csv": f"file,label,split\n1.png,a,train\n{cells[code]}\n"})
    with pytest.raises(SourceError, match=rf"has 1 class \(a\),.* and 1 not taken as {code}, such as photos:"):
        pull_path(tmp_path / "ws", place)


# 24, 21: twins


def test_twin_classes_are_told_with_the_line_that_unites_them(tmp_path: Path) -> None:
    place = write_photos(tmp_path / "photos", 3, classes=("Cat", "cat", "dog"))
    report = pull_path(tmp_path / "ws", place)
    told = [line for line in describe_pull(report) if line.startswith("TWINS")]
    assert told == ["TWINS: 'Cat' and 'cat' may be one class; if so: ingest.label_map: {\"Cat\": \"cat\"}"]
    united = pull_path(tmp_path / "ws", place, label_map={"Cat": "cat"})
    assert united.version.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("classes", "twins"),
    [
        (("1", "1.0", "2"), 1),
        (("01", "1"), 1),
        (("hot dog", "hot-dog", "hot_dog", "Hotdog"), 1),
        (("\uff23at", "Cat"), 1),
        (("cat\u200b", "cat"), 1),
        (("1.5", "15", "10", "100"), 0),
        (("c", "c++", "-", "_", "+"), 0),
    ],
)
def test_what_twins_are(classes: tuple[str, ...], twins: int) -> None:
    assert len(describe_twins(classes)) == twins


def test_labels_of_folders_and_of_earlier_versions_are_in_nfc(tmp_path: Path) -> None:
    place = write_photos(tmp_path / "photos", 3, classes=("cafe\u0301", "dog"))
    report = pull_path(tmp_path / "ws", place, label_map={"cafe\u0301": "bar"})
    assert report.version.classes == ("bar", "dog")
    plain = pull_path(tmp_path / "b", place)
    assert plain.version.classes == ("café", "dog")


def test_labels_and_their_rules_are_in_nfc() -> None:
    rules = make_label_rules(make_params({"name": "x", "ingest": {"label_map": {"e\u0301": "o\u0308"}}}), ())
    assert rules.rename(("cafe\u0301",)) == ("caf\u00e9",)
    assert rules.rename(("\u00e9",)) == ("\u00f6",)
    assert rules.rename(("n\u0303", "a")) == ("a", "\u00f1")


def test_an_image_without_a_suffix_that_a_row_names_is_taken_and_not_passed_over(tmp_path: Path) -> None:
    place = write(tmp_path / "photos", {"1": IMAGES[1], "sub/2": IMAGES[2], "3": b"x", "4.png": IMAGES[4]})
    write(place, {"labels.csv": "file,label\n1,a\nsub/2,b\n4.png,a\n"})
    assert pull_path(tmp_path / "ws", place).account.describe() == "sum: 5 files = 3 taken, 2 passed over"
