"""The stage `prepare`: from the pin and the store to memory-mapped arrays, of all images or of a subset.

Images are made in chunks, on all cores or on a Ray cluster, and written as they are made. Resumable by chunk: finished
ones are in the journal of the work folder, with a checksum.

A subset is taken by strata. A stratum is one class of one side; an image of several labels belongs to the stratum of
its rarest label. The places are divided among strata by the method of Sainte-Laguë (1910). It is fair to small strata,
and monotone: with more images or a higher limit few images leave the subset. Within a stratum the images with the
lowest sha256 are taken, so that one new image changes one place at most.
"""

import heapq
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from visionloop.data.chunks import (
    Chunk,
    ChunkMaker,
    Layout,
    compute_checksum,
    get_train_size,
    make_disk_error,
    make_layouts,
    read_checksum,
    write_chunk,
)
from visionloop.data.manifest import load_pin, load_records, write_records
from visionloop.data.shards import write_index
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import DatasetError, ParamsError, shorten
from visionloop.parallel import Engine, count_cores, map_chunks
from visionloop.params import Compute, Params, Prepare
from visionloop.params.train import check_threshold
from visionloop.records import SIDES, ImageRecord, Pin, compute_digest
from visionloop.store import ObjectStore
from visionloop.workfolder import lock_work, replace_folder
from visionloop.workspace import Workspace

Stratum = tuple[str, str]  # side, class
# Bytes of results from other machines that this process holds at a time.
HELD_BYTES = 512 * 1024 * 1024
# With fewer pixels for each core (about 1.5 s of work) processes take longer to start than they save.
MIN_PER_PROCESS = 400_000_000
PIXELS_PER_IMAGE = 25_000  # the fixed cost of an image, counted in pixels
# Chunks that are handed out at a time, for each core. What comes back from a process is only a checksum.
WAVE = 64
JOURNAL = "chunks.staged"  # `replace_folder` leaves no *.staged behind


def choose_subset(records: Sequence[ImageRecord], limit: int) -> list[ImageRecord]:
    """Return `limit` images in about the proportions of `records`, sorted by sha256; all if there are fewer.

    Each class of each side has at least one image, as far as `limit` allows. The training side comes first.
    """
    ordered = sorted(records, key=lambda r: r.sha256)
    counts = Counter((r.side, label) for r in ordered for label in r.labels)
    strata: dict[Stratum, list[ImageRecord]] = defaultdict(list)
    for record in ordered:
        strata[record.side, _find_rarest(record, counts)].append(record)
    first = choose_first(ordered, counts, limit)
    taken = Counter((r.side, _find_rarest(r, counts)) for r in first.values())
    seats = divide_seats({name: len(members) for name, members in strata.items()}, limit, taken)
    chosen = list(first.values())
    for name, members in strata.items():
        others = [r for r in members if r.sha256 not in first]
        chosen += others[: seats[name] - taken[name]]
    return sorted(chosen, key=lambda r: r.sha256)


def choose_first(ordered: Sequence[ImageRecord], counts: Mapping[Stratum, int], limit: int) -> dict[str, ImageRecord]:
    """Choose at most `limit` images, by sha256, that show every class on every side: the first of each.

    The rarest class comes first: where images have several labels, its image often shows others too.
    """
    first_of: dict[Stratum, ImageRecord] = {}
    for record in ordered:
        for label in record.labels:
            first_of.setdefault((record.side, label), record)
    chosen: dict[str, ImageRecord] = {}
    shown: set[Stratum] = set()
    for stratum in sorted(counts, key=lambda name: (SIDES.index(name[0]), counts[name], name[1])):
        if stratum not in shown and len(chosen) < limit:
            record = first_of[stratum]
            chosen[record.sha256] = record
            shown.update((record.side, label) for label in record.labels)
    return chosen


def divide_seats(sizes: Mapping[Stratum, int], limit: int, taken: Mapping[Stratum, int]) -> dict[Stratum, int]:
    """Divide `limit` seats among strata by their sizes. Some are `taken` already; none gets more seats than images.

    The next seat goes to the largest size / (2 x seats + 1). Example: sizes 53, 24 and 23, limit 7. The first three
    seats go to 53, 24 and 23 (one each), the next to 53 / 3 = 17.7, 53 / 5 = 10.6, 24 / 3 = 8.0 and 23 / 3 = 7.7,
    before 53 / 7 = 7.6. The result is 3, 2 and 2.
    """
    seats = {name: taken.get(name, 0) for name in sizes}
    claims = [(-size / (2 * seats[name] + 1), name) for name, size in sizes.items() if size > seats[name]]
    heapq.heapify(claims)
    for _ in range(min(limit, sum(sizes.values())) - sum(seats.values())):
        _, name = heapq.heappop(claims)
        seats[name] += 1
        if seats[name] < sizes[name]:
            heapq.heappush(claims, (-sizes[name] / (2 * seats[name] + 1), name))
    return seats


def _find_rarest(record: ImageRecord, counts: Mapping[Stratum, int]) -> str:
    """Return the label of an image that is rarest on its side; "" without a label."""
    return min(record.labels, key=lambda label: (counts[record.side, label], label), default="")


def prepare(
    workspace: Workspace, *, code_digest: str = "", on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Pin:
    """Decode and resize the labelled images of the pinned version into data/prepared; return the pin.

    Raises:
        DatasetError: the pin or an image is missing from the store, was forgotten, or no image is labelled; the disk
            is full.
        ParamsError: the parameters do not fit each other, or the engine cannot be used.
    """
    settings, params, store = workspace.settings, workspace.params, workspace.store
    check_params(params)
    pin = load_pin(settings.pin_path, workspace.name)
    records = select_records(load_records(store, pin), load_tombstones(store, pin.name), params, pin)
    layouts = make_layouts(records, params.prepare)
    task = resolve_task(params.task, {label for r in records for label in r.labels}, pin)
    check_threshold(params.train, task)
    key = compute_digest([pin.digest, task, params.prepare.model_dump(mode="json"), code_digest])
    with lock_work(settings.work_dir("prepare"), key) as work:
        for layout in layouts:
            layout.make_files(work)
        known = _read_journal(work)
        chunks = [c for layout in layouts for c in layout.list_chunks(params.prepare.resize)]
        waiting = [c for c in chunks if not _is_done(work, c, known)]
        _check_room(work, sum(c.num_bytes for c in waiting))
        _make_images(
            work,
            waiting,
            store,
            params.compute,
            lambda left: on_progress(len(records) - left, len(records)),
        )
        _write_tables(work, pin, task, params.prepare, layouts)
        replace_folder(work, settings.prepared_dir)
    return pin


def check_params(params: Params) -> None:
    """Raise ParamsError if the sections do not fit each other."""
    if params.prepare.unlabelled == "negative" and params.task != "multilabel":
        raise ParamsError(
            "params.yaml prepare.unlabelled",
            f"got 'negative' with `task: {params.task}`",
            "'exclude': with one label an image, one without a label has no answer",
            "Edit the file, or set `task: multilabel`.",
        )
    size_hw, train_hw = params.prepare.size_hw, get_train_size(params.prepare)
    if train_hw and (train_hw[0] < size_hw[0] or train_hw[1] < size_hw[1]):
        raise ParamsError(
            "params.yaml prepare.train_size",
            f"got {train_hw[0]} x {train_hw[1]}",
            f"image_size, {size_hw[0]} x {size_hw[1]}, or larger",
            "Edit the file.",
        )


def select_records(
    records: Sequence[ImageRecord], forgotten: frozenset[str], params: Params, pin: Pin
) -> list[ImageRecord]:
    """Return the records to prepare, in the order of sha256.

    Raises:
        DatasetError: some were forgotten, none is labelled, or one has several labels and the task is not multilabel.
    """
    where = f"dataset {pin.name} version {pin.version}"
    if gone := [r.sha256[:12] for r in records if r.sha256 in forgotten]:
        raise DatasetError(
            where,
            f"names {len(gone)} forgotten image{'s' * (len(gone) > 1)}: {shorten(gone)}",
            "a version without them",
            "Pin a later one: `visionloop ingest`.",
        )
    with_negatives = params.prepare.unlabelled == "negative"
    chosen = [r for r in records if (r.labels or with_negatives) and r.side != "excluded"]
    if not any(r.labels for r in chosen):
        raise DatasetError(where, "has no labelled image", "labelled images", "Ingest a source with labels.")
    several = [r.origins[0] for r in chosen if len(r.labels) > 1]
    if several and params.task != "multilabel":
        todo = "Set `task: multilabel` in params.yaml, or correct them."
        raise DatasetError(where, f"has several labels at {shorten(several)}", "one label an image", todo)
    return choose_subset(chosen, params.prepare.limit) if params.prepare.limit else chosen


def resolve_task(task: str, classes: Collection[str], pin: Pin) -> str:
    """Return the task: `auto` is binary with two classes, else multiclass. Raises DatasetError."""
    where = f"dataset {pin.name} version {pin.version}"
    found = f"has {len(classes)} class{'es' * (len(classes) != 1)} ({shorten(list(classes))}) for `task: {task}`"
    if task == "binary" and len(classes) != 2:
        raise DatasetError(where, found, "two", "Set `task: auto` in params.yaml, or correct the labels.")
    if task == "multilabel" and len(classes) < 2:
        todo = "Give its absence a label of its own and set `task: auto`, or ingest images of other classes."
        raise DatasetError(where, found, "two or more", todo)
    return ("binary" if len(classes) == 2 else "multiclass") if task == "auto" else task


def choose_engine(compute: Compute, num_pixels: int) -> Engine:
    """Return where to run: on the cluster of `compute`, else on this machine, in threads if there is little work."""
    if compute.engine == "ray":
        return Engine("ray", compute.address)
    cores = count_cores()
    return Engine("processes" if cores > 1 and num_pixels >= MIN_PER_PROCESS * cores else "threads")


def _make_images(
    work: Path, waiting: Sequence[Chunk], store: ObjectStore, compute: Compute, on_progress: Callable[[int], None]
) -> None:
    """Make chunks, write each finished one into the journal, and report how many images are left."""
    left = sum(len(c.images) for c in waiting)
    on_progress(left)
    if not waiting:
        return
    engine = choose_engine(compute, sum(i.num_pixels + PIXELS_PER_IMAGE for c in waiting for i in c.images))
    is_remote = engine.kind == "ray"
    maker = ChunkMaker(store if engine.kind == "threads" else store.url, None if is_remote else work)
    held = HELD_BYTES // max(c.num_bytes for c in waiting) if is_remote else WAVE * count_cores()
    with (work / JOURNAL).open("a") as journal:
        for chunk, result in map_chunks(maker, waiting, engine, max_held=held):
            if not isinstance(result, int):
                write_chunk(work, chunk, result)
            checksum = result if isinstance(result, int) else compute_checksum(result)
            journal.write(f"{chunk.file} {chunk.first_row} {checksum}\n")
            journal.flush()
            left -= len(chunk.images)
            on_progress(left)


def _check_room(work: Path, num_bytes: int) -> None:
    """Raise DatasetError if the disk has too little room, before an hour of work is spent."""
    if (free := shutil.disk_usage(work).free) < num_bytes:
        raise make_disk_error(work, f"{free / 1e9:,.1f} GB free", f"{num_bytes / 1e9:,.1f} GB")


def _read_journal(work: Path) -> dict[tuple[str, int], int]:
    """Return file, first row -> checksum of the finished chunks. A last line that a kill cut short is no match."""
    path = work / JOURNAL
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()] if path.is_file() else []
    return {(p[0], int(p[1])): int(p[2]) for p in lines if len(p) == 3 and p[1].isdecimal() and p[2].isdecimal()}


def _is_done(work: Path, chunk: Chunk, known: dict[tuple[str, int], int]) -> bool:
    checksum = known.get((chunk.file, chunk.first_row))
    return checksum is not None and checksum == read_checksum(work, chunk)


def _write_tables(work: Path, pin: Pin, task: str, section: Prepare, layouts: Sequence[Layout]) -> None:
    records = sorted((r for layout in layouts for r in layout.records), key=lambda r: r.sha256)
    classes = sorted({label for r in records for label in r.labels})
    index = {name: i for i, name in enumerate(classes)}
    labels_n = [sorted(index[label] for label in r.labels) for r in records]
    write_index(
        work,
        sha256_n=[r.sha256 for r in records],
        label_n=[labels[0] if labels else -1 for labels in labels_n],
        side_n=[r.side for r in records],
        labels_n=labels_n if task == "multilabel" else None,
    )
    with (work / "manifest.parquet").open("wb") as file:
        write_records(file, records)
    images, *larger = layouts
    report = {
        "dataset": pin.to_json(),
        "task": task,
        "image_size": list(section.size_hw),
        "resize": section.resize,
        "num_images": len(records),
        **images.describe(),
        "sides": {s: sum(r.side == s for r in records) for s in ("train", "val", "test")},
    }
    if task == "multilabel":
        report["num_negative"] = sum(not r.labels for r in records)
    if larger:
        report["train_shards"] = {"size": list(larger[0].size_hw), **larger[0].describe()}
    (work / "classes.json").write_text(json.dumps(classes, indent=2) + "\n")
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")
