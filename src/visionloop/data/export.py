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
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionloop.data.manifest import make_image_key, make_lost_error
from visionloop.errors import DatasetError, ObjectMissing, SettingsError
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
Write = Callable[[Path, ObjectStore, Sequence[ImageRecord], Count], dict[str, str]]


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
    """Write records of a version into `target`, a new or empty folder.

    Raises:
        SettingsError: the target is not empty, or the disk is too small.
        DatasetError: there is nothing to export, or an image is missing from the store or damaged there.
        BusyError: another process is exporting to the same place.
    """
    where = f"dataset {version.name} version {version.version}"
    if not records:
        raise DatasetError(where, "has no such image", "images to export", "See `visionloop datasets show`.")
    num_bytes = sum(record.num_bytes for record in records)
    _check_target(target, num_bytes)
    write: Write = {"folders": _write_folders, "webdataset": _write_shards}[form]
    key = compute_digest([version.name, version.digest, form, [r.sha256 for r in records]])
    waiting = target.parent / f".{target.name}.export"
    with lock_work(waiting, key) as work:
        paths = write(work, store, records, lambda done: on_progress(done, len(records)))
        _write_csv(work / "images.csv", records, paths)
        os.replace(work, target)
    shutil.rmtree(waiting, ignore_errors=True)
    return Exported(target, len(records), num_bytes, sum(not record.labels for record in records))


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
        found = f"the disk has {free / 1e9:.1f} GB free"
        raise SettingsError(f"folder {target}", found, f"{num_bytes / 1e9:.1f} GB or more", "Choose another disk.")


def _write_folders(work: Path, store: ObjectStore, records: Sequence[ImageRecord], on_done: Count) -> dict[str, str]:
    """Write the images and the tables beside them; return the path of each image by its sha256."""
    folders = make_folder_names({label for record in records for label in record.labels})
    paths = {record.sha256: _choose_path(record, folders) for record in records}
    for folder in {Path(path).parent for path in paths.values()}:
        (work / folder).mkdir(parents=True, exist_ok=True)

    def write_image(record: ImageRecord) -> None:
        path = work / paths[record.sha256]
        if not (path.is_file() and path.stat().st_size == record.num_bytes):
            staged = path.with_name(f".{record.sha256}")
            staged.write_bytes(read_image(store, record))
            os.replace(staged, path)

    for done, _ in enumerate(map_parallel(write_image, records), start=1):
        on_done(done)
    for place, group in _group(records):
        lines = (
            json.dumps({"file_name": paths[r.sha256].split("/", 1)[1], **_describe(r)}, ensure_ascii=False)
            for r in sorted(group, key=lambda r: paths[r.sha256])
        )
        (work / place / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def _choose_path(record: ImageRecord, folders: Mapping[str, str]) -> str:
    """Return SIDE/CLASS/FILE; with several labels SIDE/FILE; without a label unlabelled/FILE."""
    name = make_file_name(record.sha256, (*record.origins, "")[0], SUFFIXES.get(record.format, "bin"))
    if not record.labels:
        return f"{UNLABELLED}/{name}"
    return f"{record.side}/{folders[record.labels[0]]}/{name}" if len(record.labels) == 1 else f"{record.side}/{name}"


def _write_shards(work: Path, store: ObjectStore, records: Sequence[ImageRecord], on_done: Count) -> dict[str, str]:
    """Write tar files of about half a gigabyte; return the path of each image (SHARD.tar/NAME) by its sha256."""
    classes = sorted({label for record in records for label in record.labels})
    (work / "classes.json").write_text(json.dumps(classes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # Readers want the same fields in every sample, and look at the content of an image, not at its suffix.
    formats = {record.format for record in records}
    suffix = SUFFIXES.get(next(iter(formats)), "jpg") if len(formats) == 1 else "jpg"
    several = any(len(record.labels) > 1 for record in records)
    sample = _Sample(suffix, {} if several else {name: str(i) for i, name in enumerate(classes)})
    paths: dict[str, str] = {}
    done = 0
    for place, group in _group(records):
        for number, shard in enumerate(_cut(group)):
            path = work / f"{place}-{number:06d}.tar"
            paths.update((record.sha256, f"{path.name}/{record.sha256}.{suffix}") for record in shard)
            if not path.is_file():
                _write_shard(path, store, shard, sample, _shift(on_done, done))
            done += len(shard)
    return paths


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
    for record in sorted(records, key=lambda r: r.sha256):
        if shard and size + record.num_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(record)
        size += record.num_bytes
    yield shard


def _group(records: Sequence[ImageRecord]) -> list[tuple[str, list[ImageRecord]]]:
    """Return the records by side; those without a label are a group of their own."""
    groups: dict[str, list[ImageRecord]] = {}
    for record in records:
        groups.setdefault(record.side if record.labels else UNLABELLED, []).append(record)
    return sorted(groups.items())


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


def _write_csv(path: Path, records: Sequence[ImageRecord], paths: Mapping[str, str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for record in sorted(records, key=lambda r: paths[r.sha256]):
            row = {**_describe(record), "path": paths[record.sha256]}
            facts = {"format": record.format, "num_bytes": record.num_bytes}
            joined = {"sources": "|".join(record.sources), "origins": "|".join(record.origins)}
            writer.writerow({**row, **facts, **joined})
