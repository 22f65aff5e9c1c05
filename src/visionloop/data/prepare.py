"""The stage `prepare`: from the pin and the store to memory-mapped arrays. Same input, same bytes.

Resumable by shard: finished shards wait in the work folder until all are there.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from visionloop.data.images import load_array
from visionloop.data.manifest import load_pin, load_records, make_image_key
from visionloop.data.shards import compute_rows_per_shard, make_shard_name, write_index
from visionloop.errors import DatasetError, ImageError, ObjectMissing
from visionloop.parallel import map_parallel
from visionloop.params import Params, Prepare
from visionloop.records import ImageRecord, Pin, compute_digest
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.workfolder import lock_work, replace_folder


def prepare(
    settings: Settings,
    params: Params,
    store: ObjectStore,
    *,
    code_digest: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pin:
    """Decode and resize every labelled image of the pinned version into data/prepared; return the pin.

    Raises:
        DatasetError: the pin or an image is missing from the store, or no image is labelled.
    """
    pin = load_pin(settings.pin_path)
    records = [r for r in load_records(store, pin) if r.labels and r.side != "excluded"]
    if not records:
        raise DatasetError(f"dataset {pin.name} version {pin.version}", "has no labelled image", "labelled images")
    section = params.prepare
    key = compute_digest([pin.digest, section.model_dump(mode="json"), code_digest])
    with lock_work(settings.work_dir("prepare"), key) as work:
        rows_per_shard = compute_rows_per_shard(section.size_hw)
        for number, start in enumerate(range(0, len(records), rows_per_shard)):
            chunk = records[start : start + rows_per_shard]
            path = work / make_shard_name(number)
            if path.is_file():
                on_progress(start + len(chunk), len(records))
            else:
                _write_shard(path, chunk, store, section, on_image=_shift(on_progress, start, len(records)))
        _write_tables(work, pin, records, section)
        replace_folder(work, settings.prepared_dir)
    return pin


def _write_shard(
    path: Path, chunk: Sequence[ImageRecord], store: ObjectStore, section: Prepare, *, on_image: Callable[[int], None]
) -> None:
    height, width = section.size_hw
    staged = path.with_suffix(".staged")
    images = np.lib.format.open_memmap(staged, mode="w+", dtype=np.uint8, shape=(len(chunk), height, width, 3))

    def decode(record: ImageRecord) -> np.ndarray:
        try:
            data = store.get(make_image_key(record.sha256))
            return load_array(data, record.origins[0], size_hw=section.size_hw, resize=section.resize)
        except (ObjectMissing, ImageError) as exc:
            raise DatasetError(
                f"image {record.sha256[:12]} ({record.origins[0]})",
                "is missing from the store or damaged there",
                "its bytes as they were ingested",
                "Ingest its source again.",
            ) from exc

    for row, array in enumerate(map_parallel(decode, chunk)):
        images[row] = array
        on_image(row + 1)
    images.flush()
    os.replace(staged, path)


def _shift(on_progress: Callable[[int, int], None], start: int, total: int) -> Callable[[int], None]:
    """Count the images of one shard on from where it starts."""
    return lambda done: on_progress(start + done, total)


def _write_tables(work: Path, pin: Pin, records: Sequence[ImageRecord], section: Prepare) -> None:
    classes = sorted({r.labels[0] for r in records})
    index = {name: i for i, name in enumerate(classes)}
    write_index(
        work,
        sha256_n=[r.sha256 for r in records],
        label_n=[index[r.labels[0]] for r in records],
        side_n=[r.side for r in records],
    )
    rows_per_shard = compute_rows_per_shard(section.size_hw)
    counts = {s: sum(r.side == s for r in records) for s in ("train", "val", "test")}
    report = {
        "dataset": pin.to_json(),
        "image_size": list(section.size_hw),
        "resize": section.resize,
        "num_images": len(records),
        "num_shards": -(-len(records) // rows_per_shard),
        "rows_per_shard": rows_per_shard,
        "sides": counts,
    }
    (work / "classes.json").write_text(json.dumps(classes, indent=2) + "\n")
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
