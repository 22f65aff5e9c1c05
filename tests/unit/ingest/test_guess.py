"""Which source a word of the command line means."""

import os
from pathlib import Path

import pytest

from source_runs import touch
from visionloop.errors import SourceError
from visionloop.ingest.sources.guess import guess_source


@pytest.mark.parametrize(
    ("files", "word", "kind", "name"),
    [
        (["Pets 2/cat/1.jpg", "Pets 2/dog/1.jpg"], "Pets 2", "folder", "pets-2"),
        (["d/train/cat/1.jpg", "d/train/dog/1.jpg", "d/labels.csv"], "d", "folder", "d"),
        (["d/cat.0.jpg", "d/dog.0.jpg"], "d", "folder", "d"),
        (["d/labels.csv", "d/sample_submission.csv", "d/train/1.jpg", "d/test/1.jpg"], "d", "table", "d"),
        (["d/meta.jsonl", "d/images/1.jpg"], "d", "table", "d"),
        (["d/meta.jsonl", "d/1.jpg"], "d", "table", "d"),
        (["d/clips/a.mp4", "d/b.MOV"], "d", "video", "d"),
        (["d/a.mp4", "d/cat/1.jpg"], "d", "folder", "d"),
        (["d/train/1.jpg", "d/test/2.jpg", "d/train/_classes.csv", "d/test/_classes.csv"], "d", "folder", "d"),
        (["d/photos/cat/1.jpg", "d/photos/dog/1.jpg", "d/info.csv"], "d", "folder", "d"),
        (["d/cat/1.jpg", "d/dog/1.jpg", "d/info.csv"], "d", "folder", "d"),
        (["d/images/1.jpg", "d/corrections.csv", "d/labels.csv"], "d", "table", "d"),
        (["d/cat/1.jpg", "d/predictions.csv", "d/code.json"], "d", "folder", "d"),
        (["labels.CSV"], "labels.CSV", "table", "labels"),
        (["a.parquet"], "a.parquet", "table", "a"),
        (["p.json"], "p.json", "table", "p"),
        (["p.zip"], "p.zip", "archive", "p"),
        (["\u00fc.mp4"], "\u00fc.mp4", "video", "video"),
    ],
)
def test_paths(tmp_path: Path, files: list[str], word: str, kind: str, name: str) -> None:
    touch(tmp_path, files)
    source = guess_source(str(tmp_path / word))
    assert (source.kind, source.name) == (kind, name)
    assert source.model_dump()["path"] == str(tmp_path / word)
    assert guess_source(str(tmp_path / word), "mine").name == "mine"


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("s3://photos/pets/2024/", "bucket", "2024"),
        ("https://api.example.org/v1/images?limit=5", "http", "images"),
        ("http://127.0.0.1:8000/", "http", "127-0-0-1"),
        ("https://example.org/a/street.mp4?x=1", "video", "street"),
        ("rtsp://u:p@cam.example.org/live", "video", "live"),
        ("own.source:records", "python", "source"),
        ("/dev/null", "video", "null"),
    ],
)
def test_addresses(text: str, kind: str, name: str) -> None:
    source = guess_source(text)
    assert (source.kind, source.name) == (kind, name)
    assert text in source.model_dump().values()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gone", r"gone: does not exist; expected a folder, a table, a \.zip, a video, a URL"),
        ("a.md", r"is a file that ends in '\.md'; expected a folder"),
        ("a.xlsx", r"is a spreadsheet; expected .*CSV UTF-8"),
        ("a.ods", "is a spreadsheet; expected"),
        ("a.pkl", r"may run code.*Save it as CSV"),
        ("a.tfrecord", r"holds no names; expected.*Save it as CSV"),
        ("a.xml", "is not a table we read; expected"),
        ("a.tar.gz", r"is a file that ends in '\.gz'.*Unpack it, or make a zip of it\."),
        ("pipe", "is neither a file nor a folder"),
        ("postgresql+psycopg://u:secret@h/d", "is a database; expected its URL and a query.*kind: sql"),
        ("sqlite:///a.db", "is a database"),
        ("ftp://u:secret@h/d", "source ftp://h: has an unknown scheme"),
        ("s3://NOT_A_BUCKET/x", r"expected s3://BUCKET/PREFIX"),
        ("http://[::1", "is no URL"),
    ],
)
def test_nothing_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    touch(tmp_path, ["a.md", "a.tar.gz", "a.xlsx", "a.ods", "a.pkl", "a.tfrecord", "a.xml"])
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=message) as caught:
        guess_source(text)
    assert "secret" not in str(caught.value)


def test_name_that_cannot_be_one(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"--name: got 'No Name'; expected lower-case letters"):
        guess_source(str(tmp_path), "No Name")


def test_a_table_inside_the_one_folder_is_meant_itself(tmp_path: Path) -> None:
    touch(tmp_path, ["d/dogs/labels.csv", "d/dogs/train/a.jpg"])
    source = guess_source(str(tmp_path / "d"))
    assert (source.kind, source.name, source.model_dump()["path"]) == ("table", "d", str(tmp_path / "d/dogs"))


def test_class_folders_are_found_behind_many_files(tmp_path: Path) -> None:
    touch(tmp_path, [f"d/cat/{i}.jpg" for i in range(2100)] + ["d/dog/1.jpg", "d/info.csv"])
    assert guess_source(str(tmp_path / "d")).kind == "folder"


IMAGES = [f"d/{part}/{part}{i}.jpg" for part in "ab" for i in range(10)]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ("a0.jpg,Ann\nb1.jpg,Bob\n", "folder"),
        ("x.jpg,Ann\n" * 40, "folder"),
        ("".join(f"{part}{i}.jpg,{part.upper()}\n" for part in "ab" for i in range(10)), "folder"),
        ("".join(f"{part}{i},{i % 3}\n" for part in "ab" for i in range(10)), None),
        ("".join(f"{part}/{part}{i}.jpg,{i % 3}\n" for part in "ab" for i in range(6)), None),
    ],
)
def test_class_folders_win_over_a_table_that_names_few_images_or_says_the_same(
    tmp_path: Path, rows: str, kind: str | None
) -> None:
    touch(tmp_path, IMAGES)
    (tmp_path / "d/info.csv").write_text(f"file,what\n{rows}")
    if kind:
        assert guess_source(str(tmp_path / "d")).kind == kind
        return
    with pytest.raises(
        SourceError, match=r"two ways: it holds class folders, and info\.csv names \d+ of 20 images"
    ) as e:
        guess_source(str(tmp_path / "d"))
    assert f"`visionloop ingest {tmp_path}/d/info.csv`" in str(e.value)
    assert f"`visionloop ingest {tmp_path}/d --pattern '{{label}}/'`" in str(e.value)
    assert guess_source(str(tmp_path / "d/info.csv")).kind == "table"
    assert guess_source(str(tmp_path / "d"), by_pattern=True).kind == "folder"


def test_a_folder_of_films_that_is_read_by_a_pattern_is_one_of_films(tmp_path: Path) -> None:
    touch(tmp_path, ["d/cat/1.mp4", "d/test/2.mp4", "d/events.csv"])
    assert guess_source(str(tmp_path / "d"), by_pattern=True).kind == "video"
