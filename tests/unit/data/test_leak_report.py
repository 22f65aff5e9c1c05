"""The leak report: its order, its place in the store, and its picture."""

import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fakes import make_image
from visionloop.data.leaks import Leak, Leaks, load_leaks, make_leak_picture, make_leaks, write_leaks
from visionloop.errors import ObjectMissing
from visionloop.records import DatasetVersion
from visionloop.store import LocalStore

ACROSS = Leak("across", "a" * 64, ("s:a.jpg",), "train", "b" * 64, ("s:b.jpg",), "test", 2, 0.4, "near duplicates")
VERSION = DatasetVersion("pets", 1, "d", None, (), 0, 0, (), {}, (), {}, None, 0, "now")


def test_the_worst_come_first() -> None:
    conflict = replace(ACROSS, kind="conflict", other=None, distance=None, difference=None)
    group, nearer = replace(ACROSS, distance=None, difference=None), replace(ACROSS, difference=0.1)
    excluded = replace(ACROSS, kind="excluded", difference=0.0)
    leaks = make_leaks([conflict, excluded, group, ACROSS, nearer])
    assert leaks.rows == (nearer, ACROSS, group, excluded, conflict)
    assert [leaks.count(kind) for kind in ("across", "excluded", "conflict")] == [3, 1, 1]


def test_a_report_survives_the_store_and_lies_under_its_digest(tmp_path: Path) -> None:
    store, leaks = LocalStore(tmp_path), make_leaks([ACROSS])
    digest = write_leaks(store, "pets", leaks)
    assert list(store.list("leaks/pets/")) == [f"leaks/pets/{digest}.json"]
    assert load_leaks(store, replace(VERSION, leaks=digest)) == leaks
    assert write_leaks(store, "pets", Leaks()) is None
    assert load_leaks(store, VERSION) == Leaks()


def test_the_picture_shows_the_pairs_that_are_still_there() -> None:
    def load(sha256: str) -> bytes:
        if sha256[0] == "c":
            raise ObjectMissing("store", "no object")
        return make_image(ord(sha256[0]), size_hw=(90, 40))

    gone = replace(ACROSS, other="c" * 64)
    conflict = replace(ACROSS, kind="conflict", other=None)
    one, three = (
        Image.open(io.BytesIO(make_leak_picture(Leaks(rows), load)))
        for rows in ((ACROSS, gone, conflict), (ACROSS,) * 3)
    )
    assert one.format == "PNG"
    assert three.height > one.height
    few = Image.open(io.BytesIO(make_leak_picture(Leaks((ACROSS,) * 3), load, shown=1)))
    assert few.height == one.height
