"""What large tables take, stage by stage: memory at its peak, processor time, objects and bytes read (docs/scale.md).

.venv/bin/python benchmarks/scale.py --only manifest --rows 1000000

Images are only simulated: their rows are real, their bytes are not there. Writes under .visionloop/bench/scale alone.
The memory is the peak of the process in a stage, above what it held when it began; the time is that of the processor.
"""

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stage import HEADER, CountedStore, stage
from visionloop.data.compare import compare_records
from visionloop.data.day_table import DayReader, encode_table
from visionloop.data.manifest import latest_version, make_image_key, make_pin
from visionloop.data.parts import commit_version, iterate_version, load_version_records, make_version
from visionloop.data.prediction_log import PREDICTIONS, read_predictions, round_embedding, tidy
from visionloop.data.rows import hold_records
from visionloop.features.kept import KeptVectors, write_vectors
from visionloop.features.neighbours import find_neighbours, find_other_neighbours, measure_agreement, to_targets
from visionloop.ingest.check import Known, check_all
from visionloop.ingest.inspect import Facts
from visionloop.ingest.item import Item
from visionloop.ingest.journal import Journal
from visionloop.ingest.merge import merge
from visionloop.ingest.moves import Wishes
from visionloop.ingest.pull import find_stored
from visionloop.params import make_params
from visionloop.promotion.entries import make_entry_key, write_pages
from visionloop.promotion.ledger import append_entry, read_champion, read_ledger
from visionloop.records import ImageRecord, LedgerEntry, canonical_json
from visionloop.words import make_log_progress

FOLDER = Path(__file__).resolve().parents[1] / ".visionloop" / "bench" / "scale"
LOG_ROWS, LOG_PARTS, LOG_FEATURES = 30_000, 4, 64  # of a day; 64 numbers, so that ten million rows fit on a disk
NUM_FEATURES = 512
FEW = 1_000  # images that are added to a version


def make_sha256(number: int) -> str:
    """Return the digest of an image that is not there."""
    return hashlib.sha256(number.to_bytes(8, "big")).hexdigest()


def make_rows(number: int) -> list[ImageRecord]:
    """Return rows as an ingest of a folder makes them, in the order of their sha256."""
    rows = []
    for i in range(number):
        sha256, label = make_sha256(i), f"class{i % 100}"
        side = ("train", "train", "train", "val", "test")[i % 5]
        place = {"sources": ("photos",), "origins": (f"photos:{label}/{i:08d}.jpg",), "ordinal": i, "group": None}
        facts = {"width": 640, "height": 480, "format": "JPEG", "num_bytes": 90_000 + i, "phash": sha256[:16]}
        rows.append(ImageRecord(sha256, (label,), key=sha256, side=side, captured_at=None, **place, **facts))
    return sorted(rows, key=lambda row: row.sha256)


def measure_manifest(number: int, folder: Path) -> None:
    """Write a version and one with a few more rows; read them as streams and whole."""
    store = CountedStore(folder)
    with stage("rows of a version, held", number):
        rows = make_rows(number)
    facts = {"split": {}, "rejected": None, "num_rejected": 0, "created_at": "bench"}
    with stage("write them", number, store):
        by_column = hold_records(rows)
        version = make_version("m", None, by_column, by_column, num_added=number, **facts)
        commit_version(store, version, by_column)
    del rows, by_column
    some = [row for row, _ in zip(iterate_version(store, version), range(1000), strict=False)]
    changed = hold_records(ImageRecord(**{**row.to_json(), "labels": ("other",)}) for row in some)
    second = make_version("m", version, changed, changed, num_added=0, **facts)
    commit_version(store, second, changed)
    with stage("read them one after the other (`start`, gate, triggers, review)", number, store):
        sum(1 for _ in iterate_version(store, version))
    with stage("compare two versions (`datasets diff`)", number, store), _any_digest():
        compare_records(iterate_version(store, version), iterate_version(store, second))
    with stage("hold them all as records (`ingest`)", number, store):
        held = load_version_records(store, version)
    del held


def measure_readers(number: int, folder: Path) -> None:
    """Run what commands do with all rows of a version, but for the images themselves."""
    from visionloop.cli.pictures import choose_images
    from visionloop.data import export, parts, prepare, rows, shards
    from visionloop.data.chunks import make_layouts
    from visionloop.features.album import AlbumRecords
    from visionloop.features.table import EmbeddingTable
    from visionloop.forget.dataset import commit_without
    from visionloop.forget.resolve import resolve_images

    store, params = CountedStore(folder), make_params({"name": "m"})
    held = hold_records(make_rows(number))
    facts = {"split": {}, "rejected": None, "num_rejected": 0, "created_at": "bench"}
    version = make_version("m", None, held, held, num_added=number, **facts)
    assert commit_version(store, version, held)
    del held
    pin = make_pin(version)
    deque(iterate_version(store, version), maxlen=0)  # loads what is loaded once
    with stage("by column, one after the other", number, store):
        deque(parts.iterate_batches(store, version), maxlen=0)
    with stage("as records, one after the other", number, store):
        deque(iterate_version(store, version), maxlen=0)
    with stage("`datasets show`", number, store):
        rows.tally_rows(parts.iterate_batches(store, version))
        choose_images(iterate_version(store, version))
    with stage("`prepare`: rows, chunks, tables", number, store), (folder / "rows").open("w+b") as file:
        selected = prepare.select_rows(parts.iterate_batches(store, version), frozenset(), params, pin, file)
        (layout,) = make_layouts(selected, params.prepare)
        chunks = list(layout.list_chunks("squash"))
        layout.count_pixels(chunks)
        deque(layout.fill(chunks), maxlen=0)
        prepare._write_tables(folder, pin, "multiclass", params.prepare, selected)
    del selected, layout, chunks
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "num_shards": 0}))
    with stage("prepared data opened (`train`, `evaluate`, `embed`)", number):
        prepared = shards.load_prepared(folder)
    with stage("its rows opened (`similar`, `suspects`)", number):
        records = AlbumRecords(prepared)
    with stage("its embeddings looked up, none there", number):
        EmbeddingTable(store, "0" * 64).lookup(prepared.sha256_n)
    del records, prepared
    with stage("`forget`: which images are meant", number, store):
        resolve_images(store, "m", [make_sha256(0)], ["photos:class1/*1.jpg"])
    with stage("`forget`: the version without them", number, store):
        commit_without(store, "m", frozenset({make_sha256(0)}), now="bench")
    with stage("`datasets export`: its tables", number, store), (folder / "rows").open("w+b") as file:
        kept = rows.hold_rows(parts.iterate_batches(store, version), file)
        names = export.make_folder_names(export._add_up(kept).labels)
        for name in ("train", "val", "test"):
            (folder / name).mkdir()
        paths = (export._choose_path(row, names) for row in kept)
        export._write_tables(folder, kept, paths, with_metadata=True)


@contextmanager
def _any_digest() -> Iterator[None]:
    """The second version is put together from a few rows, so its digest is not that of all."""
    from visionloop.errors import DatasetError

    try:
        yield
    except DatasetError as exc:
        assert "rows have digest" in str(exc), exc


class StoreOfAll(CountedStore):
    """A store that lists images which are not there."""

    num_images = 0

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        if prefix != "images/":
            return super().list(prefix, after)
        return (make_image_key(make_sha256(i)) for i in range(self.num_images))


def measure_ingest(number: int, folder: Path) -> None:
    """Pull what the journal knows: the first version, the same once more, and a few images more.

    Each pull is one stage, as all that it holds is on top of each other; then its memory by parts of it.
    """
    store, params = StoreOfAll(folder), make_params({"name": "m", "ingest": {"max_rejected_ratio": 1.0}})
    store.num_images = number + FEW
    journal = Journal(folder / "journal.sqlite", store.url, params.ingest)
    for start in range(0, number + FEW, 10_000):
        stop = min(number + FEW, start + 10_000)
        journal.keep((item.origin, item.stamp, _make_facts(i)) for i, item in _offer(start, stop))
    journal.flush()

    def pull(what: str, num_offered: int) -> None:
        offered = (item for _, item in _offer(0, num_offered))
        parent = latest_version(store, "m")
        with stage(f"{what}: all of it", number, store):
            with stage(f"{what}: offers, and what is known of them", number, store):
                known = Known(journal, find_stored(store, journal, frozenset()))
                checked = check_all(offered, store, params.ingest, known)
                del known
            with stage(f"{what}: merge: labels, near duplicates, sides, digest", number, store):
                merged = merge(store, params, parent, checked, now="bench", wishes=Wishes(allow_new_classes=True))
            if merged.version is not parent:
                with stage(f"{what}: write it", number, store):
                    commit_version(store, merged.version, merged.changed)

    pull("first pull", number)
    pull("the same again", number)
    pull(f"{FEW:,} images more", number + FEW)


def _offer(start: int, stop: int) -> Iterator[tuple[int, Item]]:
    """Offer images in the order of their paths, as a folder does: 10,000 of each class."""
    for i in range(start, stop):
        label = f"class{i // 10_000:05d}"
        place = f"photos:{label}/{i:08d}.jpg"
        yield i, Item(place, "photos", (label,), _no_bytes, f"{90_000 + i}-1795000000000000000-{i}")


def _no_bytes(max_bytes: int) -> bytes:
    raise AssertionError("what the journal knows is not read")


def _make_facts(number: int) -> Facts:
    sha256 = make_sha256(number)
    return Facts(sha256, 640, 480, "JPEG", 90_000 + number, sha256[:16])


def measure_ledger(number: int, folder: Path) -> None:
    """Read the champion of a ledger, and all of it; then append an entry. The entries are written as plain files."""
    store, bundle = CountedStore(folder), None
    facts = {"action": "promote", "model_version": "1", "run_id": "0" * 32, "by": "ann", "why": "passed", "at": "2026"}
    (folder / "ledger" / "m").mkdir(parents=True)
    for i in range(1, number + 1):
        place = {"number": i, "decision": i, "dataset": {"name": "m", "version": i}, "previous": bundle}
        bundle = make_sha256(i)
        entry = LedgerEntry(name="m", bundle=bundle, **place, **facts)
        (folder / make_entry_key("m", i)).write_bytes(canonical_json(entry.to_json()))
    with stage("write all pages, as where there are none", number, store):
        write_pages(store, "m", number)
    with stage("the champion", number, store):
        champion = read_champion(store, "m")
    with stage("the champion, by a server that knows the one before", number, store):
        read_champion(store, "m", since=number - 1)
    with stage("all entries (`history`, gate, `doctor`, `promote`)", number, store):
        assert len(read_ledger(store, "m").entries) == number
    with stage("append one entry", number, store):
        append_entry(store, "m", champion, bundle=make_sha256(0), **facts, decision=None, dataset={})


def measure_log(number: int, folder: Path) -> None:
    """Write days of the prediction log; read a day of it, one column of all, and tidy up."""
    store, rng = CountedStore(folder), np.random.default_rng(0)
    first = datetime(2026, 1, 1, tzinfo=UTC)
    num_days = -(-number // LOG_ROWS)
    for part in range(num_days * LOG_PARTS):
        start = first + part * timedelta(days=1) / LOG_PARTS
        rows = _make_answers(LOG_ROWS // LOG_PARTS, start, rng)
        store.put(PREDICTIONS.make_key("m", start.date(), f"{start:%H%M%S}-bench"), encode_table(rows))
    some = frozenset(rows["image_sha256"].to_pylist()[:1])
    end = first + timedelta(days=num_days)
    columns = ["request_id", "time", "image_sha256", "model_digest", "prediction", "confidence"]
    for when in ("as servers wrote it", "merged"):
        for what, length in (("a day", timedelta(days=1)), ("an hour", timedelta(hours=1))):
            with stage(f"{when}: {what}, without embeddings (`monitor`)", number, store):
                read_predictions(store, "m", end - length, end, columns)
        with stage(f"{when}: the parts that hold an image (`forget`)", number, store):
            assert len(DayReader(PREDICTIONS, store, "m").find_parts(some)) == 1
        with stage(f"{when}: `predictions tidy`", number, store):
            tidy(store, "m", now=end, keep_days=None)
    with stage("remove what is older than half of the days", number, store):
        tidy(store, "m", now=end, keep_days=num_days // 2)


def _make_answers(number: int, start: datetime, rng: np.random.Generator) -> pa.Table:
    """Return rows of a part as servers write them, made by columns."""
    digits = rng.bytes(32 * number).hex()
    sha256_n = [digits[i : i + 64] for i in range(0, len(digits), 64)]
    second = timedelta(days=1) / LOG_ROWS
    numbers = round_embedding(rng.random(number * LOG_FEATURES, np.float32))
    columns: dict[str, Any] = {
        "request_id": [sha256[:24] for sha256 in sha256_n],
        "time": [start + i * second for i in range(number)],
        "client": ["camera"] * number,
        "image_sha256": sha256_n,
        "model_digest": ["0" * 64] * number,
        "classes": [["cat", "dog"]] * number,
        "probs": [[0.75, 0.25]] * number,
        "prediction": ["cat"] * number,
        "confidence": rng.random(number, np.float32),
        "embedding": pa.ListArray.from_arrays(range(0, len(numbers) + 1, LOG_FEATURES), numbers),
        "total_ms": rng.random(number, np.float32),
    }
    schema = PREDICTIONS.make_schema()
    return pa.table({name: columns.get(name, [None] * number) for name in schema.names}, schema=schema)


def measure_neighbours(number: int, folder: Path, num_features: int) -> None:
    """Search among vectors in clusters: few queries, exactly and by what is kept of the first; and all of them."""
    rng, path = np.random.default_rng(0), folder / "vectors"
    near = rng.normal(size=(200, num_features)).astype(np.float32)
    table = np.empty((number, num_features), np.float32)
    for start in range(0, number, 50_000):
        some = table[start : start + 50_000]
        some[:] = near[rng.integers(0, 200, len(some))] + rng.normal(size=some.shape).astype(np.float32)
    for queries in (1, 16, 100):
        with stage(f"{queries} of all vectors", number):
            find_neighbours(table[:queries], table, 9)
    with stage("keep the vectors (the first `similar`)", number):
        write_vectors(path, "bench", table)
    for what in ("1, by what was kept: opened and for the first time", "1, again (the next `similar`)"):
        with stage(what, number):
            KeptVectors(path, "bench").find(table[:1], 9)
    kept = KeptVectors(path, "bench")
    with stage("16, by what was kept", number):
        kept.find(table[:16], 9)
    times = []
    for row in rng.choice(number, 20, replace=False):
        started = time.perf_counter()
        assert kept.find(table[row : row + 1], 9)[1][0, 0] == row
        times.append(time.perf_counter() - started)
    print(f"1, by what was kept, wall clock: median {1000 * sorted(times)[10]:,.0f} ms, most {1000 * max(times):,.0f}")
    started = time.perf_counter()
    with stage("all of all (`suspects`)", number):
        distance, found = find_other_neighbours(table, 10, on_progress=_tell_progress())
    print(f"all of all, wall clock: {time.perf_counter() - started:,.0f} s")
    with stage("whether they know more than chance, 100 classes", number):
        measure_agreement(distance, found, to_targets(rng.integers(0, 100, number), 100))
    rows = rng.choice(number, 500, replace=False)
    exact = find_neighbours(table[rows], table, 11)[1]
    recall = np.mean([len({*a} & ({*b} - {row})) / 10 for row, a, b in zip(rows, found[rows], exact, strict=True)])
    print(f"recall of the 10 nearest of 500 of them: {recall:.3f}")


def _tell_progress() -> Callable[[int, int], None]:
    return make_log_progress("compared", "images", lambda line: print(line, file=sys.stderr, flush=True), every_s=30)


PARTS: dict[str, tuple[Callable[..., None], int]] = {
    "manifest": (measure_manifest, 1_000_000),
    "readers": (measure_readers, 1_000_000),
    "ingest": (measure_ingest, 1_000_000),
    "ledger": (measure_ledger, 100_000),
    "log": (measure_log, 10_000_000),
    "neighbours": (measure_neighbours, 1_000_000),
}


def main() -> None:
    """Measure what was asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="benchmarks/scale.py", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="one of the parts; may be given again")
    parser.add_argument("--rows", type=int, help="how many; default: a million, of the log ten, of the ledger 100,000")
    parser.add_argument("--width", type=int, default=512, help="numbers of a vector, for neighbours; default: 512")
    parser.add_argument("--here", action="store_true", help="in this process, and no head of the table")
    chosen = parser.parse_args()
    if not chosen.here:
        print(HEADER, flush=True)
        rows = ["--rows", str(chosen.rows)] if chosen.rows else []
        rows += ["--width", str(chosen.width)]
        for name in chosen.only or PARTS:
            subprocess.run([sys.executable, __file__, "--here", "--only", name, *rows], check=True)
        return
    for name in chosen.only:
        measure, number = PARTS[name]
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        hold_records(make_rows(10))  # loads what is loaded once
        more = [chosen.width] if measure is measure_neighbours else []
        measure(chosen.rows or number, folder, *more)
        shutil.rmtree(folder)
        print(f"whole process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:,.0f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
