"""What a pull puts down because it is too much to hold: the same results in groups of any size, and little memory."""

import errno
import gc
import hashlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visionloop.data.images import UInt8Array
from visionloop.data.leaks import load_leaks
from visionloop.data.manifest import latest_version, load_quarantine
from visionloop.data.parts import commit_version, load_version_records
from visionloop.errors import DiskError, SourceError
from visionloop.ingest import sides, spill
from visionloop.ingest.check import Known, check_all
from visionloop.ingest.inspect import Facts
from visionloop.ingest.item import Item
from visionloop.ingest.journal import Journal
from visionloop.ingest.labels import Correction
from visionloop.ingest.merge import merge
from visionloop.ingest.moves import Wishes
from visionloop.ingest.spill import Spill
from visionloop.params import make_params
from visionloop.records import Rejected
from visionloop.store import LocalStore

# Of the code that held all images in memory, over these pulls.
BEFORE = "5f99d489933c7447d35820cf48278307bbc4a3458476199ca755dca8cd36aa94"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a few rows."""
    for name, number in {"RUN_ROWS": 5, "PLAIN_ROWS": 3, "BLOCK_ROWS": 2}.items():
        monkeypatch.setattr(spill, name, number)


# Rows in groups


@pytest.mark.parametrize("number", [0, 1, 5, 6, 37])
@pytest.mark.usefixtures("small")
def test_rows_come_back_in_their_order_and_sorted_as_often_as_they_are_asked_for(tmp_path: Path, number: int) -> None:
    plain, in_order = Spill(tmp_path), Spill(tmp_path, is_sorted=True)
    rows = [(7 * i % 37, f"row {i}", None, ("a", "b")) for i in range(number)]
    for row in rows:
        plain.add(row)
        in_order.add(row)
    for _ in range(2):
        assert [*plain] == rows
        assert [*in_order] == sorted(rows)
    assert (len(plain), len(in_order)) == (number, number)
    wanted = [i for i in range(number) if i % 4 != 1]
    assert [*plain.pick(wanted)] == [rows[i] for i in wanted]


@pytest.mark.usefixtures("small")
def test_what_is_put_down_has_no_name_so_that_a_kill_leaves_nothing(tmp_path: Path) -> None:
    one = Spill(tmp_path / "work")
    one.add((1,))
    assert not (tmp_path / "work").exists(), "a few rows are no reason for a file"
    for i in range(2, 9):
        one.add((i,))
    assert [*(tmp_path / "work").iterdir()] == []
    assert [*one] == [(i,) for i in range(1, 9)]


@pytest.mark.usefixtures("small")
def test_a_full_disk_and_a_place_that_is_no_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(place: Path) -> None:
        one = Spill(place)
        for i in range(9):
            one.add((i,))

    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"file/work: cannot be written \(Not a directory\); expected room for what a"):
        fill(tmp_path / "file" / "work")

    def write(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(DiskError, match=r"cannot be written \(No space left on device\).* Make room, .* run the same"):
        fill(tmp_path)


@pytest.mark.usefixtures("small")
def test_a_reader_that_stops_early_leaves_no_file_open(tmp_path: Path) -> None:
    one = Spill(tmp_path, is_sorted=True)
    for i in range(20):
        one.add((i,))
    rows, file = iter(one), one._file
    assert next(rows) == (0,)
    del one
    assert next(rows) == (1,), "who reads holds the file"
    del rows
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


# Whole pulls


def make_sha256(number: int) -> str:
    return hashlib.sha256(f"image {number}".encode()).hexdigest()


NUMBERS = {make_sha256(i): i for i in range(240)}


def name_scene(number: int) -> int:
    """Of five images two or three are of one scene: near duplicates."""
    return number // 5 if number % 5 < 3 else 1000 + number


def make_facts(number: int) -> Facts:
    scene = int(hashlib.sha256(f"scene {name_scene(number)}".encode()).hexdigest()[:16], 16)
    phash = f"{scene ^ (1 << number % 64):016x}" if number % 17 else ""
    converted, bits = ("HEIC" if number % 31 == 0 else ""), (9 + number % 7 if number % 11 == 0 else 0)
    return Facts(make_sha256(number), 40 + number % 7, 50, "PNG", 1000 + number, phash, converted, bits)


def draw_scenes(store: object, names: Sequence[str]) -> list[UInt8Array | None]:
    """Stand for the thumbnails of images that are not there; some cannot be decoded."""
    shades = np.arange(32, dtype=np.uint8)[:, None, None] * np.ones((32, 32, 3), np.uint8)
    numbers = [NUMBERS[name] for name in names]
    return [shades * (1 + name_scene(number) % 7) if number % 23 else None for number in numbers]


def offer(number: int, step: int) -> Iterator[Item | Rejected]:
    """Offer an image, and what makes trouble: copies, other labels and sides, groups, places that change."""
    label = "rare" if number % 61 == 0 else ("cat", "dog", "cow", "elk")[number % 4]
    folder = "moved" if step and number % 19 == 0 else "cow" if step and number % 29 == 0 else label
    place = f"a:film.mp4#t={number}" if number % 41 == 0 else f"a:{folder}/{number}.png"
    side = {0: "test", 1: "train", 2: "val"}.get(number % 9) if number % 2 else None
    group = f"film{number % 8}" if number % 7 == 0 else f"lone{number}" if number % 43 == 0 else None
    labels = ((label, "dog") if number % 53 == 0 else (folder,)) if number % 47 else ()
    at = "2026-01-01T00:00:00" if number % 13 == 0 else None
    item = Item(place, "a", labels, len, f"stamp {number}", side, number % 5 == 0, group, at, number % 15 == 0)  # type: ignore[arg-type]
    yield item
    if number % 10 == 0:
        yield item._replace(origin=f"b:{label}/{number}-copy.png", source="b", labels=(label,))
    if number % 33 == 0:
        yield item._replace(origin=f"b:dog/{number}.png", source="b", labels=("dog",))
    if number % 37 == 0:
        yield Rejected(f"a:{number}.txt", "not_an_image", "is text", is_row=number % 2 == 0)


def pull_often(home: Path) -> list[Any]:
    """Pull five times with other offers, rules and wishes; return all that came of it."""
    store, results = LocalStore(home / "store"), list[Any]()
    order = sorted(range(240), key=lambda number: make_sha256(7 * number))
    sections: list[dict[str, Any]] = [
        {"split": {"min_train": 3}},
        {"split": {"min_train": 3, "on_leak": "exclude"}},
        {"label_map": {"elk": "cow"}, "split": {"min_train": 0}},
        {"expect": {"min_per_class": 8}},
        {"split": {"on_leak": "fail"}},
    ]
    for step, section in enumerate(sections):
        params = make_params({"name": "m", "ingest": {"max_rejected_ratio": 1.0, **section}})
        journal = Journal(home / "work" / "journal.sqlite", store.url, params.ingest)
        some = [number for number in order[: 80 + 40 * step] if (number + step) % 20]
        offers = [one for number in some for one in offer(number, step)]
        for one in offers:
            if isinstance(one, Item):
                number = int(one.stamp.split()[1]) if one.stamp else 0
                bad = Rejected(one.origin, "damaged", "is damaged")
                journal.keep([(one.origin, one.stamp, bad if number % 59 == 0 else make_facts(number))])
        journal.flush()
        checked = check_all(offers, store, params.ingest, Known(journal))
        journal.close()
        parent = latest_version(store, "m")
        rows = load_version_records(store, parent)[5:7] if parent else []
        lines = [Correction(n, row.sha256[:12], "".join(row.labels), "horse") for n, row in enumerate(rows)]
        wishes = Wishes(True, step == 2, step == 3, {"a", "b"}, answers={make_sha256(order[3]): ("dog",)})
        try:
            merged = merge(
                store, params, parent, checked, now="now", corrections=lines if step == 1 else (), wishes=wishes
            )
        except SourceError as exc:
            results.append(str(exc))
            continue
        told = [merged.notes, merged.remarks, merged.advice, [one.to_json() for one in merged.refused]]
        results.append([checked.offers, checked.num_places, told, merged.version.to_json()])
        if merged.version is not parent:
            assert commit_version(store, merged.version, merged.changed)
            parts = [*load_leaks(store, merged.version).rows, *load_quarantine(store, merged.version)]
            results.append([one.to_json() for one in (*load_version_records(store, merged.version), *parts)])
    return results


def test_in_small_groups_versions_and_lists_are_those_of_the_code_that_held_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(sides, "_load_thumbs", draw_scenes)
    monkeypatch.setattr("visionloop.ingest.merge.count_unusable", len)  # that code counted all that was listed
    held = pull_often(tmp_path / "held")
    request.getfixturevalue("small")
    made, init = list[weakref.ref[Spill]](), Spill.__init__

    def note(self: Spill, *args: Any, **facts: Any) -> None:
        made.append(weakref.ref(self))
        init(self, *args, **facts)

    monkeypatch.setattr(Spill, "__init__", note)
    gc.disable()
    try:
        assert pull_often(tmp_path / "put down") == held
        assert made
        assert not any(one() for one in made), "their files would stay open until Python collects garbage"
    finally:
        gc.enable()
    assert hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest() == BEFORE


# Pulls images of which the journal knows all; then the same once more, and a few more. Of few and of many: prints the
# memory that the many took more, in kB.
PULL = """
import hashlib, resource, sys
from pathlib import Path
from visionloop.data import manifest, parts, rows
from visionloop.ingest import spill
from visionloop.ingest.check import Known, check_all
from visionloop.ingest.inspect import Facts
from visionloop.ingest.item import Item
from visionloop.ingest.journal import Journal
from visionloop.ingest.merge import merge
from visionloop.params import make_params
from visionloop.store import LocalStore

spill.RUN_ROWS, spill.PLAIN_ROWS, rows.GROUP_ROWS, rows.BATCH_ROWS = 1024, 256, 1024, 256
params = make_params({"name": "m", "ingest": {"max_rejected_ratio": 1.0}})

def offer(stop):
    for i in range(stop):
        yield Item(f"a:class{i % 9}/{i:08d}.jpg", "a", (f"class{i % 9}",), len, f"stamp {i}")

def pull(home, number):
    store = LocalStore(home / "store")
    journal = Journal(home / "journal.sqlite", store.url, params.ingest)
    for i, item in enumerate(offer(number + 10)):
        sha256 = hashlib.sha256(str(i).encode()).hexdigest()
        journal.keep([(item.origin, item.stamp, Facts(sha256, 640, 480, "JPEG", i, sha256[:16]))])
    journal.flush()
    for some in (number, number, number + 10):
        checked = check_all(offer(some), store, params.ingest, Known(journal))
        parent = manifest.latest_version(store, "m")
        merged = merge(store, params, parent, checked, now="now")
        assert (merged.version.num_images, len(checked.inspected), checked.num_read) == (some, some, 0)
        assert merged.version is parent or parts.commit_version(store, merged.version, merged.changed)
    assert merged.version.version == 2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

few, many = (pull(Path(sys.argv[1]) / number, int(number)) for number in sys.argv[2:])
print(many - few)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the most memory is counted in another way")
def test_memory_of_a_pull_hardly_grows_with_its_images(tmp_path: Path) -> None:
    """It held 2,400 bytes of each. A bound of 600 leaves room for what an allocator does."""
    command = [sys.executable, "-c", PULL, str(tmp_path), "5000", "15000"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 1024 * int(done.stdout) / 10_000 < 600
