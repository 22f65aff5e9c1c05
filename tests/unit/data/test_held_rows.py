"""What reads all rows of a dataset holds few bytes of each; the rows themselves are tested in test_manifest.py."""

import json
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest

from visionloop.cli.pictures import choose_images
from visionloop.data import manifest, parts
from visionloop.data.chunks import make_layouts
from visionloop.data.parts import hold_version, iterate_batches
from visionloop.data.prepare import select_rows
from visionloop.data.rows import hold_records, hold_rows, tally_rows
from visionloop.data.shards import load_prepared, write_index
from visionloop.features.album import AlbumRecords
from visionloop.forget.resolve import resolve_images
from visionloop.params import make_params
from visionloop.records import DatasetVersion, ImageRecord
from visionloop.store import LocalStore

FACTS = {"num_added": 0, "split": {}, "rejected": None, "num_rejected": 0, "created_at": "2026"}


def make_version(store: LocalStore, number: int) -> DatasetVersion:
    rows = []
    for i in range(number):
        sha256, side = f"{i:064x}", ("train", "train", "val", "test")[i % 4]
        place = {"sources": ("photos",), "origins": (f"photos:{i % 10}/{i:08d}.jpg",), "ordinal": i, "group": None}
        facts = {"width": 64, "height": 48, "format": "JPEG", "num_bytes": 1000 + i, "phash": f"{i:016x}"}
        labels = (f"class{i % 10}",)
        rows.append(ImageRecord(sha256, labels, key=sha256, side=side, captured_at=None, **place, **facts))
    held = hold_records(rows)
    version = parts.make_version("pets", None, held, held, **FACTS)
    assert parts.commit_version(store, version, held)
    return version


def show(store: LocalStore, version: DatasetVersion, folder: Path) -> None:
    assert tally_rows(iterate_batches(store, version)).sides.total() == version.num_images
    assert len(choose_images(parts.iterate_version(store, version))) == 25


def select(store: LocalStore, version: DatasetVersion, folder: Path) -> None:
    params, pin = make_params({"name": "pets"}), manifest.make_pin(version)
    with (folder / "rows").open("w+b") as file:
        selected = select_rows(iterate_batches(store, version), frozenset(), params, pin, file)
        (layout,) = make_layouts(selected, params.prepare)
        chunks = list(layout.list_chunks("squash"))
        assert sum(chunk.length for chunk in chunks) == version.num_images
        deque(layout.fill(chunks), maxlen=0)


def write_prepared(store: LocalStore, version: DatasetVersion, folder: Path) -> None:
    with (folder / "manifest.parquet").open("w+b") as file:
        rows = hold_rows(iterate_batches(store, version), file)
        columns = (batch.select(["sha256", "side"]) for batch in rows.iterate_batches())
        write_index(folder, (batch.append_column("label", batch["side"].is_null().cast("int64")) for batch in columns))
    facts = {"task": "multiclass", "resize": "squash", "image_size": [4, 4], "num_shards": 0, "rows_per_shard": 1}
    (folder / "report.json").write_text(json.dumps({**facts, "dataset": manifest.make_pin(version).to_json()}))
    (folder / "classes.json").write_text('["cat"]')


def open_album(store: LocalStore, version: DatasetVersion, folder: Path) -> None:
    if not (folder / "index.parquet").is_file():
        write_prepared(store, version, folder)
    prepared = load_prepared(folder)
    records = AlbumRecords(prepared)
    row = records[len(records) - 1]
    assert (row.sha256, row.side) == (f"{version.num_images - 1:064x}", "test")
    assert row.origins == (f"photos:9/{version.num_images - 1:08d}.jpg",)
    assert len(prepared.load_keys(prepared.rows("test")[:9])) == 9


def resolve(store: LocalStore, version: DatasetVersion, folder: Path) -> None:
    assert len(resolve_images(store, "pets", ["0" * 56 + "00000011"], ["photos:3/*3.jpg"]).records) > 2


READERS: dict[str, tuple[Callable[[LocalStore, DatasetVersion, Path], object], int]] = {
    "one after the other": (lambda store, version, _: deque(parts.iterate_version(store, version), maxlen=0), 25),
    "datasets show": (show, 30),
    "lineage, export": (lambda store, version, _: hold_version(store, version), 120),
    "prepare": (select, 60),
    "similar, suspects; training": (open_album, 100),
    "forget's search": (resolve, 90),  # each tenth row is meant
}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Path, DatasetVersion]]]:
    """Two datasets, of 1,000 and of 4,000 images, in small groups: so few are in memory at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionloop.data.rows.BATCH_ROWS", 500)
        patch.setattr("visionloop.data.rows.GROUP_ROWS", 500)
        folders = [tmp_path_factory.mktemp(f"rows{number}") for number in (1000, 4000)]
        yield [(one, make_version(LocalStore(one / "store"), 1000 * 4**i)) for i, one in enumerate(folders)]


@pytest.mark.parametrize("what", READERS)
def test_few_bytes_are_held_of_a_row(versions: list[tuple[Path, DatasetVersion]], what: str) -> None:
    """The peak of what Python and NumPy allocate, of 4,000 rows against 1,000; Arrow's batches are not in it."""
    read, most = READERS[what]
    peaks = []
    for folder, version in versions:
        store = LocalStore(folder / "store")
        read(store, version, folder)  # loads what is loaded once
        tracemalloc.start()
        try:
            read(store, version, folder)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 3000 < most


def test_an_index_is_read_back_as_it_was(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    write_prepared(store, make_version(store, 300), tmp_path)
    prepared = load_prepared(tmp_path)
    names = [f"{i:064x}" for i in range(300)]
    assert prepared.sha256_n == names and list(prepared.sha256_n[7:9]) == names[7:9] and prepared.sha256_n != names[1:]
    assert prepared.sha256_n[-1] == names[-1] and prepared.side_n.tolist()[:4] == ["train", "train", "val", "test"]
    with pytest.raises(IndexError):
        prepared.sha256_n[300]
    held = hold_rows(iterate_batches(store, manifest.load_version(store, "pets", 1)), BytesIO())
    assert [row.ordinal for row in prepared.load_records(prepared.rows("val")[::-1][:3])] == [298, 294, 290]
    assert held[298].ordinal == 298
