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
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from visionloop.data.chunks import (
    Chunk,
    ChunkMaker,
    Layout,
    Selected,
    compute_checksum,
    get_train_size,
    make_disk_error,
    make_layouts,
    read_checksum,
    write_chunk,
)
from visionloop.data.manifest import load_pin, load_pinned
from visionloop.data.parts import iterate_batches
from visionloop.data.rows import Places, decode_column, hold_rows
from visionloop.data.shards import write_index
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import DatasetError, ParamsError, format_bytes, shorten
from visionloop.parallel import Engine, count_cores, map_chunks
from visionloop.params import Compute, Params, Prepare
from visionloop.params.train import check_threshold
from visionloop.records import SIDES, Pin, compute_digest
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


def choose_subset(
    side_n: NDArray[np.int8], set_n: NDArray[np.int32], label_sets: Sequence[tuple[str, ...]], limit: int
) -> Places:
    """Return the places of `limit` images in about the proportions of all, ascending; all if there are fewer.

    The images are in the order of sha256, and told by `Selected.side_n` and so on. Each class of each side has at least
    one image, as far as `limit` allows. The training side comes first.
    """
    kinds, firsts, kind_n, numbers = np.unique(
        side_n * np.int64(len(label_sets)) + set_n, return_index=True, return_inverse=True, return_counts=True
    )
    kind_labels = [(SIDES[kind // len(label_sets)], label_sets[kind % len(label_sets)]) for kind in kinds.tolist()]
    counts: Counter[Stratum] = Counter()
    first_of: dict[Stratum, int] = {}
    for (side, labels), number, first in zip(kind_labels, numbers.tolist(), firsts.tolist(), strict=True):
        for label in labels:
            counts[side, label] += number
            first_of[side, label] = min(first, first_of.get((side, label), first))
    chosen = choose_first(
        {name: (place, kind_labels[kind_n[place]][1]) for name, place in first_of.items()}, counts, limit
    )
    stratum_of = [
        (side, min(labels, key=lambda label: (counts[side, label], label), default="")) for side, labels in kind_labels
    ]
    sizes: Counter[Stratum] = Counter()
    for name, number in zip(stratum_of, numbers.tolist(), strict=True):
        sizes[name] += number
    taken = Counter(stratum_of[kind_n[place]] for place in chosen)
    seats = divide_seats(sizes, limit, taken)
    names = sorted(sizes)
    stratum_n = np.asarray([names.index(name) for name in stratum_of], np.int32)[kind_n]
    stratum_n[list(chosen)] = -1
    order_n = np.argsort(stratum_n, kind="stable")
    starts = np.searchsorted(stratum_n[order_n], range(len(names))).tolist()
    others = [order_n[at : at + seats[name] - taken[name]] for name, at in zip(names, starts, strict=True)]
    return np.sort(np.concatenate([np.asarray(sorted(chosen), np.int64), *others]))


def choose_first(
    first_of: Mapping[Stratum, tuple[int, tuple[str, ...]]], counts: Mapping[Stratum, int], limit: int
) -> set[int]:
    """Choose at most `limit` images that show every class on every side: of each the first, with the labels it has.

    The rarest class comes first: where images have several labels, its image often shows others too.
    """
    chosen: set[int] = set()
    shown: set[Stratum] = set()
    for stratum in sorted(counts, key=lambda name: (SIDES.index(name[0]), counts[name], name[1])):
        if stratum not in shown and len(chosen) < limit:
            place, labels = first_of[stratum]
            chosen.add(place)
            shown.update((stratum[0], label) for label in labels)
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


def prepare(
    workspace: Workspace,
    *,
    code_digest: str = "",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    is_copied: bool = False,
) -> Pin:
    """Decode and resize the labelled images of the pinned version into data/prepared; return the pin.

    `is_copied`: what is made is copied once more on the same disk afterwards, so there must be room for that too.

    Raises:
        DatasetError: the pin or an image is missing from the store, was forgotten, or no image is labelled; the disk
            is full.
        ParamsError: the parameters do not fit each other, or the engine cannot be used.
    """
    settings, params, store = workspace.settings, workspace.params, workspace.store
    check_params(params)
    pin = load_pin(settings.pin_path, workspace.name)
    folder = settings.work_dir("prepare").parent
    with _open_nameless(folder) as held, _open_nameless(folder) as some:
        selected = select_rows(
            iterate_batches(store, load_pinned(store, pin)), load_tombstones(store, pin.name), params, pin, held
        )
        if params.prepare.limit:
            selected = _take_subset(selected, params.prepare.limit, some)
        _prepare(workspace, pin, selected, code_digest, on_progress, is_copied=is_copied)
    return pin


def _prepare(
    workspace: Workspace,
    pin: Pin,
    selected: Selected,
    code_digest: str,
    on_progress: Callable[[int, int], None],
    *,
    is_copied: bool,
) -> None:
    settings, params = workspace.settings, workspace.params
    layouts, total = make_layouts(selected, params.prepare), len(selected.rows)
    task = resolve_task(params.task, selected.classes, pin)
    check_threshold(params.train, task)
    key = compute_digest([pin.digest, task, params.prepare.model_dump(mode="json"), code_digest])
    with lock_work(settings.work_dir("prepare"), key) as work:
        for layout in layouts:
            layout.make_files(work)
        known = _read_journal(work)
        waiting = [
            (layout, [c for c in layout.list_chunks(params.prepare.resize) if not _is_done(work, c, known)])
            for layout in layouts
        ]
        to_write = sum(c.num_bytes for _, chunks in waiting for c in chunks)
        kept_again = sum(c.num_bytes for layout in layouts for c in layout.list_chunks(params.prepare.resize))
        _check_room(work, to_write + (kept_again if is_copied else 0))
        _make_images(work, waiting, workspace.store, params.compute, lambda left: on_progress(total - left, total))
        _write_tables(work, pin, task, params.prepare, selected)
        replace_folder(work, settings.prepared_dir)


@contextmanager
def _open_nameless(folder: Path) -> Iterator[BinaryIO]:
    """Yield a new file without a name, which is gone when it is closed. Raises DatasetError: the disk is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            yield cast(BinaryIO, file)
    except OSError as exc:
        if exc.errno != ENOSPC:
            raise
        raise make_disk_error(folder, exc.strerror or str(exc)) from exc


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


def select_rows(
    batches: Iterable[pa.RecordBatch], forgotten: frozenset[str], params: Params, pin: Pin, file: BinaryIO
) -> Selected:
    """Write the rows to prepare, of all of a version in the order of sha256, into a file; return them.

    Raises:
        DatasetError: some were forgotten, none is labelled, or one has several labels and the task is not multilabel.
    """
    where, tombstones = f"dataset {pin.name} version {pin.version}", pa.array(sorted(forgotten), pa.string())
    gone: list[str] = []
    several: list[str] = []
    side_parts, set_parts = [np.zeros(0, np.int8)], [np.zeros(0, np.int32)]
    place_of: dict[tuple[str, ...], int] = {}

    def choose(batch: pa.RecordBatch) -> pa.RecordBatch:
        gone.extend(batch["sha256"].filter(pc.is_in(batch["sha256"], tombstones)).to_pylist() if forgotten else ())
        is_used_n = batch["side"].to_numpy(zero_copy_only=False) != "excluded"
        if params.prepare.unlabelled != "negative":
            is_used_n &= batch["labels"].value_lengths().to_numpy() > 0
        chosen = batch.filter(pa.array(is_used_n))
        has_several = pc.greater(chosen["labels"].value_lengths(), 1)
        several.extend(origins[0] for origins in chosen["origins"].filter(has_several).to_pylist())
        labels = decode_column(chosen["labels"])
        set_parts.append(np.asarray([place_of.setdefault(one, len(place_of)) for one in labels], np.int32))
        side_parts.append(np.asarray([SIDES.index(side) for side in decode_column(chosen["side"])], np.int8))
        return chosen

    rows = hold_rows(map(choose, batches), file)
    if gone:
        raise DatasetError(
            where,
            f"names {len(gone)} forgotten image{'s' * (len(gone) > 1)}: {shorten([sha256[:12] for sha256 in gone])}",
            "a version without them",
            "Pin a later one: `visionloop ingest`.",
        )
    if not any(place_of):
        raise DatasetError(where, "has no labelled image", "labelled images", "Ingest a source with labels.")
    if several and params.task != "multilabel":
        todo = "Set `task: multilabel` in params.yaml, or correct them."
        raise DatasetError(where, f"has several labels at {shorten(several)}", "one label an image", todo)
    return Selected(rows, np.concatenate(side_parts), np.concatenate(set_parts), tuple(place_of))


def _take_subset(selected: Selected, limit: int, file: BinaryIO) -> Selected:
    places = choose_subset(selected.side_n, selected.set_n, selected.label_sets, limit)
    rows = hold_rows(selected.rows.pick_batches(places), file)
    return Selected(rows, selected.side_n[places], selected.set_n[places], selected.label_sets)


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
    work: Path,
    waiting: Sequence[tuple[Layout, Sequence[Chunk]]],
    store: ObjectStore,
    compute: Compute,
    on_progress: Callable[[int], None],
) -> None:
    """Make chunks, write each finished one into the journal, and report how many images are left."""
    chunks = [chunk for _, some in waiting for chunk in some]
    left = sum(chunk.length for chunk in chunks)
    on_progress(left)
    if not chunks:
        return
    num_pixels = sum(layout.count_pixels(some) for layout, some in waiting)
    engine = choose_engine(compute, num_pixels + PIXELS_PER_IMAGE * left)
    is_remote = engine.kind == "ray"
    maker = ChunkMaker(store if engine.kind == "threads" else store.url, None if is_remote else work)
    held = HELD_BYTES // max(c.num_bytes for c in chunks) if is_remote else WAVE * count_cores()
    filled = (chunk for layout, some in waiting for chunk in layout.fill(some))
    with (work / JOURNAL).open("a") as journal:
        for chunk, result in map_chunks(maker, filled, engine, max_held=held):
            if not isinstance(result, int):
                write_chunk(work, chunk, result)
            checksum = result if isinstance(result, int) else compute_checksum(result)
            journal.write(f"{chunk.file} {chunk.first_row} {checksum}\n")
            journal.flush()
            left -= chunk.length
            on_progress(left)


def _check_room(work: Path, num_bytes: int) -> None:
    """Raise DatasetError if the disk has too little room, before an hour of work is spent."""
    if (free := shutil.disk_usage(work).free) < num_bytes:
        raise make_disk_error(work, f"{format_bytes(free)} free", format_bytes(num_bytes))


def _read_journal(work: Path) -> dict[tuple[str, int], int]:
    """Return file, first row -> checksum of the finished chunks. A last line that a kill cut short is no match."""
    path = work / JOURNAL
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()] if path.is_file() else []
    return {(p[0], int(p[1])): int(p[2]) for p in lines if len(p) == 3 and p[1].isdecimal() and p[2].isdecimal()}


def _is_done(work: Path, chunk: Chunk, known: dict[tuple[str, int], int]) -> bool:
    checksum = known.get((chunk.file, chunk.first_row))
    return checksum is not None and checksum == read_checksum(work, chunk)


def _write_tables(work: Path, pin: Pin, task: str, section: Prepare, selected: Selected) -> None:
    classes = selected.classes
    index = {name: i for i, name in enumerate(classes)}
    labels_s = [sorted(index.get(label, -1) for label in labels) for labels in selected.label_sets]
    write_index(work, _make_index(selected, labels_s, with_all=task == "multilabel"))
    with (work / "manifest.parquet").open("wb") as file:
        selected.rows.file.seek(0)
        shutil.copyfileobj(selected.rows.file, file)
    images, *larger = make_layouts(selected, section)
    report = {
        "dataset": pin.to_json(),
        "task": task,
        "image_size": list(section.size_hw),
        "resize": section.resize,
        "num_images": len(selected.rows),
        **images.describe(),
        "sides": {side: selected.count(side) for side in ("train", "val", "test")},
    }
    if task == "multilabel":
        has_none_s = np.asarray([not labels for labels in selected.label_sets])
        report["num_negative"] = int(has_none_s[selected.set_n].sum())
    if larger:
        report["train_shards"] = {"size": list(larger[0].size_hw), **larger[0].describe()}
    (work / "classes.json").write_text(json.dumps(classes, indent=2) + "\n")
    (work / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _make_index(selected: Selected, labels_s: Sequence[Sequence[int]], *, with_all: bool) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the index; `labels_s` are the classes of each of the label sets."""
    first_s = pa.array([labels[0] if labels else -1 for labels in labels_s], pa.int64())
    all_s = pa.array(labels_s, pa.list_(pa.int64()))
    start = 0
    for batch in selected.rows.iterate_batches(("sha256", "side")):
        sets = pa.array(selected.set_n[start : start + len(batch)])
        start += len(batch)
        columns = {"sha256": batch["sha256"], "label": first_s.take(sets), "side": batch["side"]}
        yield pa.record_batch({**columns, "labels": all_s.take(sets)} if with_all else columns)
