"""A dataset version as files that other tools read: folders with tables, or WebDataset shards, safely named.

    folders     SIDE/CLASS/DIGEST-NAME.jpg  SIDE/metadata.jsonl  unlabelled/...  images.csv
    webdataset  SIDE-000000.tar ...  unlabelled-000000.tar ...  classes.json  images.csv

Hugging Face's `imagefolder` reads a `metadata.jsonl` in each split. It is JSON lines, because in a CSV the label "3"
would be read as a number and "NA" as a missing value. `images.csv` is for people and other tools.

The target appears only when it is complete. An export that was stopped goes on where it stopped.

File names are safe on every file system: ASCII letters, digits, `.`, `_`, `-` and space; all else is escaped, as
`%C3%A9`. No name leads out of its folder, is hidden, is reserved by Windows, or means a split to Hugging Face.
"""

import csv
import hashlib
import io
import json
import mmap
import os
import re
import shutil
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from visionloop.data.manifest import make_image_key, make_lost_error
from visionloop.errors import DatasetError, ObjectMissing, SettingsError, format_bytes
from visionloop.parallel import map_parallel
from visionloop.records import DatasetVersion, ImageRecord, compute_digest
from visionloop.store import ObjectStore
from visionloop.workfolder import lock_work

MAX_FOLDER = 100
MAX_STEM = 60
_KEPT = re.compile(r"[A-Za-z0-9._ -]")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.I)
# Hugging Face takes a folder for a split if its name holds such a word between these separators.
_SPLIT_WORD = re.compile(
    r"(?:^|[-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?=$|[-._ 0-9])"
)
FORMATS = ("folders", "webdataset")
UNLABELLED = "unlabelled"
SUFFIXES: Mapping[str, str] = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "HEIF": "heic"}
SHARD_BYTES = 512 * 1024 * 1024
COLUMNS = (
    *("path", "label", "side", "group", "captured_at", "width", "height", "format", "num_bytes"),
    *("sha256", "sources", "origins"),
)
Progress = Callable[[int, int], None]
Count = Callable[[int], None]
Write = Callable[[Path, ObjectStore, Sequence[ImageRecord], "_Facts", Count], Iterator[str]]
TABLE_ROWS = 4096  # whose paths are put away together


def make_file_name(sha256: str, origin: str, suffix: str) -> str:
    """Return DIGEST-STEM.SUFFIX: the first 16 digits of the sha256, and the name of the file at its first origin."""
    stem = re.split(r"[/\\:!]", origin)[-1].rpartition(".")[0] or re.split(r"[/\\:!]", origin)[-1]
    safe = _escape(stem).strip(" .")[:MAX_STEM].rstrip(" .%")
    return f"{sha256[:16]}-{safe}.{suffix}" if safe else f"{sha256[:16]}.{suffix}"


def make_folder_names(labels: Iterable[str]) -> dict[str, str]:
    """Return a folder name for each label. They differ from each other even if upper and lower case are the same."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for label in sorted(labels):
        name = make_folder_name(label)
        if name.lower() in taken:
            name = f"{name}-{_digest(label)}"
        taken.add(name.lower())
        names[label] = name
    return names


def make_folder_name(label: str) -> str:
    """Return a label as the name of a folder."""
    name = _escape(label)
    if len(name) > MAX_FOLDER:
        name = f"{name[:MAX_FOLDER].rstrip('%. ')}-{_digest(label)}"
    if not name or name.startswith((".", " ", "__")) or _RESERVED.match(name):
        name = _escape_at(name, 0)
    if name.endswith((".", " ")):
        name = _escape_at(name, len(name) - 1)
    while word := _SPLIT_WORD.search(name):
        name = _escape_at(name, word.start(1))
    return name


def _escape(text: str) -> str:
    return "".join(c if _KEPT.match(c) else _percent(c) for c in text)


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _escape_at(name: str, place: int) -> str:
    return f"{name[:place]}{_percent(name[place : place + 1] or '_')}{name[place + 1 :]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


@dataclass(frozen=True)
class _Sample:
    """What all samples of an export share: the image suffix, and the number of each class (empty: no `.cls`)."""

    suffix: str
    index: Mapping[str, str]


@dataclass
class _Facts:
    """What must be known of all records before the first one is written."""

    digest: str = ""
    num_bytes: int = 0
    num_unlabelled: int = 0
    has_several: bool = False
    labels: set[str] = field(default_factory=set)
    formats: set[str] = field(default_factory=set)
    places: set[str] = field(default_factory=set)


def _add_up(records: Iterable[ImageRecord]) -> _Facts:
    facts, total = _Facts(), hashlib.sha256()
    for record in records:
        total.update(record.sha256.encode())
        facts.num_bytes += record.num_bytes
        facts.num_unlabelled += not record.labels
        facts.has_several |= len(record.labels) > 1
        facts.labels.update(record.labels)
        facts.formats.add(record.format)
        facts.places.add(_find_place(record))
    facts.digest = total.hexdigest()
    return facts


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    num_images: int
    num_bytes: int
    num_unlabelled: int


def export_version(
    store: ObjectStore,
    version: DatasetVersion,
    records: Sequence[ImageRecord],
    target: Path,
    *,
    form: str = "folders",
    on_progress: Progress = lambda done, total: None,
) -> Exported:
    """Write records of a version, in the order of sha256, into `target`, a new or empty folder.

    Raises:
        SettingsError: the target is not empty, or the disk is too small.
        DatasetError: there is nothing to export, or an image is missing from the store or damaged there.
        BusyError: another process is exporting to the same place.
    """
    where = f"dataset {version.name} version {version.version}"
    if not records:
        raise DatasetError(where, "has no such image", "images to export", "See `visionloop datasets show`.")
    facts = _add_up(records)
    _check_target(target, facts.num_bytes)
    write: Write = {"folders": _write_folders, "webdataset": _write_shards}[form]
    key = compute_digest([version.name, version.digest, form, facts.digest])
    waiting = target.parent / f".{target.name}.export"
    with lock_work(waiting, key) as work:
        paths = write(work, store, records, facts, lambda done: on_progress(done, len(records)))
        _write_tables(work, records, paths, with_metadata=form == "folders")
        os.replace(work, target)
    shutil.rmtree(waiting, ignore_errors=True)
    return Exported(target, len(records), facts.num_bytes, facts.num_unlabelled)


def read_image(store: ObjectStore, record: ImageRecord) -> bytes:
    """Return the bytes of an image, checked against its digest. Raises DatasetError."""
    try:
        data = store.get(make_image_key(record.sha256))
        found = hashlib.sha256(data).hexdigest()
    except ObjectMissing:
        found = "nothing"
    if found != record.sha256:
        raise make_lost_error(record.sha256, (*record.origins, "unknown origin")[0])
    return data


def _check_target(target: Path, num_bytes: int) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise SettingsError(f"folder {target}", "is not empty", "a new or empty folder", "Choose another one.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as exc:
        raise SettingsError(f"folder {target}", f"cannot be made ({exc.strerror})", "a place to write to") from exc
    if num_bytes > free:
        found = f"the disk has {format_bytes(free)} free"
        raise SettingsError(f"folder {target}", found, f"{format_bytes(num_bytes)} or more", "Choose another disk.")


def _write_folders(
    work: Path, store: ObjectStore, records: Sequence[ImageRecord], facts: _Facts, on_done: Count
) -> Iterator[str]:
    """Write the images; yield the path of each."""
    folders = make_folder_names(facts.labels)
    for folder in {Path(_choose_path(record, folders)).parent for record in records}:
        (work / folder).mkdir(parents=True, exist_ok=True)

    def write_image(record: ImageRecord) -> None:
        path = work / _choose_path(record, folders)
        if not (path.is_file() and path.stat().st_size == record.num_bytes):
            staged = path.with_name(f".{record.sha256}")
            staged.write_bytes(read_image(store, record))
            os.replace(staged, path)

    for done, _ in enumerate(map_parallel(write_image, records), start=1):
        on_done(done)
    return (_choose_path(record, folders) for record in records)


def _choose_path(record: ImageRecord, folders: Mapping[str, str]) -> str:
    """Return SIDE/CLASS/FILE; with several labels SIDE/FILE; without a label unlabelled/FILE."""
    name = make_file_name(record.sha256, (*record.origins, "")[0], SUFFIXES.get(record.format, "bin"))
    if not record.labels:
        return f"{UNLABELLED}/{name}"
    return f"{record.side}/{folders[record.labels[0]]}/{name}" if len(record.labels) == 1 else f"{record.side}/{name}"


def _write_shards(
    work: Path, store: ObjectStore, records: Sequence[ImageRecord], facts: _Facts, on_done: Count
) -> Iterator[str]:
    """Write tar files of about half a gigabyte; yield the path of each image: SHARD.tar/NAME."""
    classes = sorted(facts.labels)
    (work / "classes.json").write_text(json.dumps(classes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # Readers want the same fields in every sample, and look at the content of an image, not at its suffix.
    suffix = SUFFIXES.get(next(iter(facts.formats)), "jpg") if len(facts.formats) == 1 else "jpg"
    sample = _Sample(suffix, {} if facts.has_several else {name: str(i) for i, name in enumerate(classes)})
    done = 0
    for place in sorted(facts.places):
        for number, shard in enumerate(_cut(record for record in records if _find_place(record) == place)):
            path = work / _name_shard(place, number)
            if not path.is_file():
                _write_shard(path, store, shard, sample, _shift(on_done, done))
            done += len(shard)
    return _iterate_paths(records, suffix)


def _iterate_paths(records: Iterable[ImageRecord], suffix: str) -> Iterator[str]:
    """Yield where each image is, as `_cut` divides them."""
    numbers, sizes = Counter[str](), Counter[str]()
    for record in records:
        place = _find_place(record)
        if sizes[place] and sizes[place] + record.num_bytes > SHARD_BYTES:
            numbers[place] += 1
            sizes[place] = 0
        sizes[place] += record.num_bytes
        yield f"{_name_shard(place, numbers[place])}/{record.sha256}.{suffix}"


def _name_shard(place: str, number: int) -> str:
    return f"{place}-{number:06d}.tar"


def _write_shard(
    path: Path,
    store: ObjectStore,
    records: Sequence[ImageRecord],
    sample: _Sample,
    on_done: Count,
) -> None:
    staged = path.with_suffix(".staged")
    with tarfile.open(staged, "w", format=tarfile.USTAR_FORMAT) as tar:
        images = map_parallel(lambda record: read_image(store, record), records)
        for number, (record, data) in enumerate(zip(records, images, strict=True), start=1):
            _add(tar, f"{record.sha256}.{sample.suffix}", data)
            if record.labels and sample.index:
                _add(tar, f"{record.sha256}.cls", sample.index[record.labels[0]].encode())
            _add(tar, f"{record.sha256}.json", json.dumps(_describe(record), ensure_ascii=False).encode())
            on_done(number)
    os.replace(staged, path)


def _shift(on_done: Count, before: int) -> Count:
    return lambda done: on_done(before + done)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # no owner, no time: the same images make the same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _cut(records: Iterable[ImageRecord]) -> Iterator[list[ImageRecord]]:
    """Cut records, in the order of sha256, into shards of about `SHARD_BYTES`."""
    shard: list[ImageRecord] = []
    size = 0
    for record in records:
        if shard and size + record.num_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(record)
        size += record.num_bytes
    yield shard


def _find_place(record: ImageRecord) -> str:
    """Return the side of an image; those without a label are a group of their own."""
    return record.side if record.labels else UNLABELLED


def _describe(record: ImageRecord) -> dict[str, Any]:
    """Return what the tables say of an image. Text is never null, so a column has the same type in every file."""
    return {
        "label": "|".join(record.labels),
        "labels": list(record.labels),
        "side": record.side,
        "group": record.group or "",
        "captured_at": record.captured_at or "",
        "width": record.width,
        "height": record.height,
        "sha256": record.sha256,
        "sources": list(record.sources),
        "origins": list(record.origins),
    }


def _write_tables(work: Path, records: Iterable[ImageRecord], paths: Iterable[str], *, with_metadata: bool) -> None:
    """Write images.csv, and metadata.jsonl in the folder of each side: a line an image, in the order of their paths.

    The lines wait in a file without a name, in the order of the records; their paths are sorted by column.
    """
    names: list[pa.Array] = []
    some: list[str] = []
    ends, lengths = array("q", [0]), array("q")
    with TemporaryFile(dir=work) as spool:
        for record, path in zip(records, paths, strict=True):
            row, line = _make_lines(record, path)
            spool.write(row + line)
            lengths.append(len(row))
            ends.append(ends[-1] + len(row) + len(line))
            some.append(path)
            if len(some) == TABLE_ROWS:
                names, some = [*names, pa.array(some)], []
        column = pa.chunked_array([*names, pa.array(some, pa.string())])
        order = pc.sort_indices(column)
        spool.flush()
        with ExitStack() as stack, mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            table = stack.enter_context((work / "images.csv").open("wb"))
            table.write(",".join(COLUMNS).encode() + b"\n")
            place, metadata = "", io.BytesIO()
            for i in order.to_numpy():
                cut = ends[i] + lengths[i]
                table.write(lines[ends[i] : cut])
                if not with_metadata:
                    continue
                if (now := column[int(i)].as_py().partition("/")[0]) != place:
                    place = now
                    metadata = stack.enter_context((work / place / "metadata.jsonl").open("wb"))
                metadata.write(lines[cut : ends[i + 1]])


def _make_lines(record: ImageRecord, path: str) -> tuple[bytes, bytes]:
    """Return an image's line of images.csv, and that of metadata.jsonl."""
    described = _describe(record)
    facts = {"format": record.format, "num_bytes": record.num_bytes}
    joined = {"sources": "|".join(record.sources), "origins": "|".join(record.origins)}
    row = {**described, "path": path, **facts, **joined}
    sink = io.StringIO(newline="")
    csv.writer(sink, lineterminator="\n").writerow([row[name] for name in COLUMNS])
    line = json.dumps({"file_name": path.partition("/")[2], **described}, ensure_ascii=False)
    return sink.getvalue().encode(), f"{line}\n".encode()
