"""Versions as plain files: folders with tables, tar shards, safe names, whole or not at all."""

import csv
import hashlib
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from visionloop.data import export
from visionloop.data.export import export_version, make_file_name, make_folder_name, make_folder_names
from visionloop.data.manifest import make_image_key
from visionloop.errors import BusyError, DatasetError, SettingsError
from visionloop.records import DatasetVersion, ImageRecord
from visionloop.store import LocalStore
from visionloop.workfolder import lock_work
from workspaces import commit, store_image

Made = tuple[LocalStore, DatasetVersion, list[ImageRecord]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Twelve images, one of them without a label, two formats."""
    store = LocalStore(tmp_path / "store")
    rows = [store_image(store, seed, format="JPEG" if seed == 5 else "PNG") for seed in range(11)]
    rows.append(store_image(store, 11, labels=(), origins=("photos:test/11.png",), side="test"))
    rows = sorted(rows, key=lambda r: r.sha256)
    return store, commit(store, [], rows), rows


def read_tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_folders_hold_every_image_once(made: Made, tmp_path: Path) -> None:
    store, version, rows = made
    done = export_version(store, version, rows, tmp_path / "out")
    files = read_tree(tmp_path / "out")
    digests = [hashlib.sha256(data).hexdigest() for name, data in files.items() if name.endswith((".png", ".jpg"))]
    assert sorted(digests) == [r.sha256 for r in rows]
    assert (done.num_images, done.num_unlabelled, done.num_bytes) == (12, 1, sum(r.num_bytes for r in rows))
    assert {name.rpartition("/")[0] for name in files} == {
        *("", "train", "val", "test", "unlabelled"),
        *("train/cat", "train/dog", "val/dog", "test/cat"),
    }
    five = next(r for r in rows if r.format == "JPEG")
    assert f"train/cat/{five.sha256[:16]}-5.jpg" in files
    assert list(tmp_path.glob(".*")) == [], "no work folder stays"


def test_metadata_beside_each_split_names_its_images(made: Made, tmp_path: Path) -> None:
    store, version, rows = made
    export_version(store, version, rows, tmp_path / "out")
    seen = set()
    for place in ("train", "val", "test", "unlabelled"):
        for line in (tmp_path / "out" / place / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            data = (tmp_path / "out" / place / row["file_name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == row["sha256"]
            assert row["label"] == "|".join(row["labels"])
            assert all(value is not None for value in row.values()), "a null would give the column another type"
            seen.add(row["sha256"])
    assert seen == {r.sha256 for r in rows}


def test_images_csv_lists_everything(made: Made, tmp_path: Path) -> None:
    store, version, rows = made
    export_version(store, version, rows, tmp_path / "out")
    with (tmp_path / "out" / "images.csv").open(newline="") as file:
        table = {row["sha256"]: row for row in csv.DictReader(file)}
    assert set(table) == {r.sha256 for r in rows}
    assert all((tmp_path / "out" / row["path"]).is_file() for row in table.values())
    some = table[rows[0].sha256]
    assert (some["side"], some["label"], some["origins"]) == (
        rows[0].side,
        "|".join(rows[0].labels),
        rows[0].origins[0],
    )


@pytest.mark.parametrize("form", export.FORMATS)
def test_the_same_version_gives_the_same_bytes(made: Made, tmp_path: Path, form: str) -> None:
    store, version, rows = made
    for name in ("one", "two"):
        export_version(store, version, rows, tmp_path / name, form=form)
    assert read_tree(tmp_path / "one") == read_tree(tmp_path / "two")


def test_shards_hold_samples_that_readers_understand(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version, rows = made
    monkeypatch.setattr(export, "SHARD_BYTES", sum(r.num_bytes for r in rows) // 5)
    export_version(store, version, rows, tmp_path / "out", form="webdataset")
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes == ["cat", "dog"]
    assert len(list((tmp_path / "out").glob("train-*.tar"))) > 1
    seen = {}
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            names = [member.name for member in members]
            assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
            for name in names:
                key, _, suffix = name.partition(".")
                file = tar.extractfile(name)
                assert file is not None
                seen.setdefault(key, {"place": path.name.rpartition("-")[0]})[suffix] = file.read()
            assert names == sorted(names, key=lambda n: n.partition(".")[0]), "a sample's files lie together"
    assert set(seen) == {r.sha256 for r in rows}
    for row in rows:
        sample: dict[str, Any] = seen[row.sha256]
        assert hashlib.sha256(sample["jpg"]).hexdigest() == row.sha256, "two formats: one suffix for all"
        assert json.loads(sample["json"])["origins"] == list(row.origins)
        if row.labels:
            assert (sample["place"], classes[int(sample["cls"])]) == (row.side, row.labels[0])
        else:
            assert sample["place"] == "unlabelled"
            assert "cls" not in sample


def test_several_labels_have_no_one_class(made: Made, tmp_path: Path) -> None:
    store, version, rows = made
    several = [replace(row, labels=("cat", "dog") if i == 0 else row.labels) for i, row in enumerate(rows)]
    export_version(store, version, several, tmp_path / "a")
    text = (tmp_path / "a" / rows[0].side / "metadata.jsonl").read_text()
    assert '"label": "cat|dog", "labels": ["cat", "dog"]' in text
    export_version(store, version, several, tmp_path / "b", form="webdataset")
    with tarfile.open(tmp_path / "b" / "train-000000.tar") as tar:
        assert not any(name.endswith(".cls") for name in tar.getnames())


@pytest.mark.parametrize("form", export.FORMATS)
def test_a_stopped_export_goes_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    store, version, rows = made
    monkeypatch.setattr(export, "SHARD_BYTES", 1)
    last = max((r for r in rows if r.side == "val" or not r.labels), key=lambda r: r.sha256)
    key = make_image_key(last.sha256)
    data = store.get(key)
    store.delete(key)
    with pytest.raises(
        DatasetError, match=r"is missing from the store or damaged there.*Run `visionloop ingest --verify`"
    ):
        export_version(store, version, rows, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists(), "nothing of a half export is seen"
    store.put(key, data)
    done_before = {p.name for p in (tmp_path / ".out.export").rglob("*") if p.suffix in {".tar", ".png"}}
    assert done_before
    reads: list[str] = []
    monkeypatch.setattr(LocalStore, "get", lambda self, key, get=LocalStore.get: reads.append(key) or get(self, key))
    export_version(store, version, rows, tmp_path / "out", form=form)
    monkeypatch.undo()
    assert 0 < len(reads) < len(rows), "what was written is not read again"
    monkeypatch.setattr(export, "SHARD_BYTES", 1)
    export_version(store, version, rows, tmp_path / "whole", form=form)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "whole")


def test_an_image_with_a_flipped_byte_is_not_exported(made: Made, tmp_path: Path) -> None:
    store, version, rows = made
    store.put(make_image_key(rows[3].sha256), b"other bytes")
    with pytest.raises(DatasetError, match=rf"image {rows[3].sha256[:12]} \(photos:"):
        export_version(store, version, rows, tmp_path / "out")


def test_targets_that_are_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, version, rows = made
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("full", "file", "link"):
        with pytest.raises(SettingsError, match=r"is not empty; expected a new or empty folder"):
            export_version(store, version, rows, tmp_path / name)
    with pytest.raises(SettingsError, match="cannot be made"):
        export_version(store, version, rows, tmp_path / "file" / "below")
    with pytest.raises(DatasetError, match="has no such image"):
        export_version(store, version, [], tmp_path / "out")
    huge = [replace(rows[0], num_bytes=10**18)]
    with pytest.raises(SettingsError, match=r"free; expected 1,000,000.0 TB or more"):
        export_version(store, version, huge, tmp_path / "out")
    monkeypatch.setattr("visionloop.workfolder.LOCK_WAIT_S", 0.0)
    with lock_work(tmp_path / ".out.export", "x"), pytest.raises(BusyError):
        export_version(store, version, rows, tmp_path / "out")
    assert (tmp_path / "full" / "x").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export_version(store, version, rows, tmp_path / "empty").num_images == 12


HOSTILE = [
    *("../x", "..", ".", "", "a/b", "a\\b", "CON", "con.txt", "COM1", "nul", " lead", "trail ", "trail.", ".hidden"),
    *("x" * 300, "é", "cafe\u0301", "猫" * 90, "a\0b", "a\nb", "%2e%2e", "C:", "Cat", "cat", "CAT", "__x__", "test"),
    *("bullet-train", "val_2", "Eval", "3", "|", "\ud800"),
]


def test_hostile_labels_stay_inside_and_apart() -> None:
    names = make_folder_names(HOSTILE)
    assert len(names) == len(HOSTILE)
    assert len({name.lower() for name in names.values()}) == len(HOSTILE), "also where case means nothing"
    for name in names.values():
        assert name
        assert name.isascii()
        assert not set(name) & set('/\\:\0\n*?"<>|')
        assert name[0] not in ". "
        assert name[-1] not in ". "
        assert len(name) < 130
        assert name.split(".")[0].lower() not in {"con", "com1", "nul"}


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("golden retriever", "golden retriever"),
        ("é", "%C3%A9"),
        ("../x", "%2E.%2Fx"),
        ("test", "%74est"),
        ("bullet-train", "bullet-%74rain"),
        ("training", "%74raining"),
        ("contest", "contest"),
        ("__background__", "%5F_background__"),
        ("CON", "%43ON"),
        ("console", "console"),
    ],
)
def test_names_of_folders(label: str, name: str) -> None:
    assert make_folder_name(label) == name


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("photos:cats/tom.jpg", "0123456789abcdef-tom.jpg"),
        ("zip:a.zip!x/../../etc/passwd", "0123456789abcdef-passwd.jpg"),
        ("photos:..\\..\\evil.exe", "0123456789abcdef-evil.jpg"),
        ("photos:" + "n" * 500 + ".png", f"0123456789abcdef-{'n' * 60}.jpg"),
        ("photos:cats/.jpg", "0123456789abcdef-jpg.jpg"),
        ("http:https://x.test/a?b=c", "0123456789abcdef-a%3Fb%3Dc.jpg"),
        ("", "0123456789abcdef.jpg"),
    ],
)
def test_names_of_files(origin: str, name: str) -> None:
    assert make_file_name("0123456789abcdef" * 4, origin, "jpg") == name


def test_hostile_labels_and_origins_are_exported_inside(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    labels = [label for label in HOSTILE if "\ud800" not in label]
    rows = [store_image(store, i, labels=(label,), origins=(f"x:{label}",)) for i, label in enumerate(labels)]
    version = commit(store, [], rows)
    before = {p for p in tmp_path.rglob("*") if tmp_path / "out" not in p.parents}
    export_version(store, version, rows, tmp_path / "in" / "out")
    new = set(tmp_path.rglob("*")) - before
    assert all(p == tmp_path / "in" or (tmp_path / "in") in p.parents for p in new)
    lines = [
        json.loads(line)
        for path in (tmp_path / "in" / "out").glob("*/metadata.jsonl")
        for line in path.read_text().split("\n")
        if line
    ]
    assert sorted(line["label"] for line in lines) == sorted(labels), "the tables have the labels as they are"
