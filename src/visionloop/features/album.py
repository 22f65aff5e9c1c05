"""A prepared dataset with the embeddings of one encoder: for each image its vector, labels, side and origin.

As a file for other tools it is Parquet, a row for each image in the order of the prepared data:

    path: string, the first origin    labels: list<string>    side: string    sha256: string
    vector: fixed-size list of float32    metadata: the encoder's digest and words, the dataset's name and version

Dimensions: n images, d features, c classes.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from visionloop.bundle import Bundle, load_bundle
from visionloop.data.images import UInt8Array, load_array
from visionloop.data.manifest import load_pinned, make_image_key
from visionloop.data.shards import Prepared
from visionloop.errors import BusyError, ImageError, ObjectMissing, PromotionError, SettingsError
from visionloop.features.embed import choose_reader, embed_prepared
from visionloop.features.encoder import Encoder, make_bundle_encoder, make_encoder
from visionloop.features.kept import DamagedVectors, KeptVectors, compute_num_bytes, make_key, write_vectors
from visionloop.features.neighbours import to_targets
from visionloop.features.table import EmbeddingTable
from visionloop.features.view import GROUP_ROWS, VECTORS, FloatArray, make_schema, make_table
from visionloop.params import WAYS_ON_EMBEDDINGS
from visionloop.records import ImageRecord
from visionloop.store import ObjectStore
from visionloop.workfolder import is_locked, lock_work, write_through
from visionloop.workspace import Workspace

GREY = 200
COLUMNS = ("path", "labels", "side", "sha256", "vector")
SUFFIX = ".parquet"
ENCODERS = ("auto", "candidate", "champion", "params")
KEPT_FROM = 50_000  # images: for fewer the table is read in a second or two


@dataclass(frozen=True, slots=True)
class AlbumRecord:
    """What an album shows of an image."""

    sha256: str
    side: str
    width: int
    height: int
    origins: tuple[str, ...]


class AlbumRecords(Sequence[AlbumRecord]):
    """What the manifest of prepared data says of its images, by column: about 50 bytes each."""

    def __init__(self, prepared: Prepared) -> None:
        """Read them. Raises DatasetError."""
        self._sha256_n = prepared.sha256_n
        with prepared.open_rows() as rows:
            table = pa.Table.from_batches(rows.iterate_batches(("side", "width", "height", "origins")))
        self._columns = [table["side"].dictionary_encode(), *table.columns[1:]]

    def __len__(self) -> int:
        return len(self._sha256_n)

    @overload
    def __getitem__(self, row: int) -> AlbumRecord: ...
    @overload
    def __getitem__(self, row: slice) -> list[AlbumRecord]: ...
    def __getitem__(self, row: int | slice) -> AlbumRecord | list[AlbumRecord]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        side, width, height, origins = (column[int(row)].as_py() for column in self._columns)
        return AlbumRecord(self._sha256_n[row], side, width, height, tuple(origins))


@dataclass(frozen=True)
class Album:
    """The images of prepared data, row by row: `records[i]` and `embedding_nd[i]` are of `prepared.sha256_n[i]`.

    `kept`: the embeddings are those of a file, from which few are to be read; else None.
    """

    prepared: Prepared
    records: Sequence[AlbumRecord | ImageRecord]
    encoder: Encoder
    embedding_nd: FloatArray
    store: ObjectStore
    kept: KeptVectors | None = None

    @cached_property
    def target_nc(self) -> NDArray[np.uint8]:
        """Which classes each image has, 0 or 1."""
        prepared = self.prepared
        if prepared.targets_nk is not None:
            return prepared.targets_nk
        return to_targets(prepared.label_n, len(prepared.classes))

    def describe_labels(self, row: int) -> str:
        """Return the labels of an image in words."""
        return ", ".join(self.prepared.labels(row)) or "(no label)"

    def get_origin(self, row: int) -> str:
        """Return where an image was first found."""
        return (*self.records[row].origins, "(unknown)")[0]

    def describe_for_machines(self) -> dict[str, Any]:
        """Return which dataset this is, and by which encoder."""
        pin = self.prepared.pin
        return {"dataset": pin.name, "version": pin.version, "encoder": self.encoder.facts.digest}

    def describe_row(self, row: int) -> dict[str, Any]:
        """Return what is known of an image, for machines."""
        record = self.records[row]
        labels = list(self.prepared.labels(row))
        return {"sha256": record.sha256, "labels": labels, "side": record.side, "origins": list(record.origins)}

    def load_picture(self, row: int, max_px: int) -> UInt8Array:
        """Return the whole image as ingested, at most `max_px` on a side. Grey if it is missing or damaged."""
        record = self.records[row]
        try:
            data = self.store.get(make_image_key(record.sha256))
            return load_array(data, record.sha256, size_hw=_fit(record, max_px), resize="squash", max_pixels=None)
        except (ImageError, ObjectMissing):
            return np.full((max_px, max_px, 3), GREY, np.uint8)

    def make_thumbnail(self, row: int, max_px: int) -> UInt8Array:
        """Return a small picture from the prepared arrays, in the image's own proportions. Fast: decodes nothing."""
        image = Image.fromarray(self.prepared.read(np.asarray([row]))[0])
        record = self.records[row] if self.prepared.resize == "squash" else None
        true = (record.width, record.height) if record else image.size
        ratio = max_px / max(true)
        size = max(1, round(true[0] * ratio)), max(1, round(true[1] * ratio))
        return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def choose_encoder(
    workspace: Workspace, prepared: Prepared, name: str, find_champion: Callable[[Workspace], Bundle | None]
) -> Encoder:
    """Return an encoder: that of the candidate, of the champion, or of the parameters (`params`).

    `auto`: that of the parameters where the way trains on it, else the candidate's, the champion's, and without either
    again that of the parameters. `find_champion` fetches its bundle; it is called where it is needed.

    Raises:
        SettingsError, PromotionError: there is no such encoder, or no champion.
        TrainingError, BundleError, ParamsError: it cannot be used.
    """
    settings, params, runtime = workspace.settings, workspace.params, workspace.params.embed.runtime
    if name not in ENCODERS:
        raise SettingsError("encoder", f"got {name!r}", f"one of {', '.join(ENCODERS)}")
    wanted = "params" if name == "auto" and params.train.way in WAYS_ON_EMBEDDINGS else name
    if wanted == "candidate" or (wanted == "auto" and settings.candidate_dir.is_dir()):
        return make_bundle_encoder(load_bundle(settings.candidate_dir), runtime=runtime)
    if wanted in {"champion", "auto"}:
        if bundle := find_champion(workspace):
            return make_bundle_encoder(bundle, runtime=runtime)
        if wanted == "champion":
            todo = "Promote one, or use `--encoder params`."
            raise PromotionError(f"ledger {params.name}", "has no champion", "a promoted model", todo)
    return make_encoder(workspace, prepared)


def load_album(
    workspace: Workspace,
    prepared: Prepared,
    encoder: Encoder,
    *,
    batch_size: int,
    tell: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Album:
    """Compute the embeddings that the table does not have yet, and put all together with the manifest's rows.

    Raises:
        DatasetError: the version is not in this store, an image is missing there, or the prepared data is damaged.
        TrainingError, BundleError, ParamsError: the encoder cannot be used.
    """
    store = workspace.store
    load_pinned(store, prepared.pin)
    records = AlbumRecords(prepared)
    embedding_nd = embed_prepared(
        EmbeddingTable(store, encoder.facts.digest, tell=tell),
        encoder,
        prepared,
        choose_reader(store, encoder, prepared, lambda row: (*records[row].origins, "")[0]),
        batch_size=batch_size,
        on_progress=on_progress,
    )
    return Album(prepared, records, encoder, embedding_nd, store)


def load_album_of_few(
    workspace: Workspace,
    prepared: Prepared,
    encoder: Encoder,
    *,
    batch_size: int,
    tell: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Album:
    """As `load_album`, for questions about few images: with the kept vectors, where they are of these images.

    Where they are not, all is loaded, and the vectors of a large dataset are kept for the next question. Not being able
    to keep them is no error. A question to damaged ones raises DamagedVectors: remove them and load again.
    """
    folder, number = workspace.settings.hidden_dir / "features", len(prepared.sha256_n)
    key = make_key(encoder.facts.digest, prepared.sha256_n) if number >= KEPT_FROM else ""
    if key:
        with contextlib.suppress(OSError, DamagedVectors):
            kept = KeptVectors(folder / VECTORS, key)
            return Album(prepared, _PreparedRecords(prepared), encoder, kept.vectors_nd, workspace.store, kept)
    album = load_album(workspace, prepared, encoder, batch_size=batch_size, tell=tell, on_progress=on_progress)
    if key and not is_locked(workspace.settings.work_dir("similar")):
        try:
            size = _keep(workspace, key, album.embedding_nd)
            tell(f"kept for the next question: {folder / VECTORS} ({size / 1e6:,.0f} MB)")
        except (OSError, BusyError) as exc:
            tell(f"the vectors are not kept, so the next question will take as long: {exc}")
    return album


def _keep(workspace: Workspace, key: str, embedding_nd: FloatArray) -> int:
    """Write the vectors of `similar` in place of any others; return their size. Raises OSError, BusyError."""
    size, target = compute_num_bytes(*embedding_nd.shape), workspace.settings.hidden_dir / "features" / VECTORS
    with lock_work(workspace.settings.work_dir("similar"), key) as work:
        free = shutil.disk_usage(work).free
        if free < 2 * size:
            raise OSError(f"they need {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")
        write_vectors(work / VECTORS, key, embedding_nd)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / VECTORS, target)
        work.rmdir()
    return size


class _PreparedRecords(Sequence[ImageRecord]):
    """The rows of prepared data's own manifest, each read when it is asked for."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared

    def __len__(self) -> int:
        return len(self._prepared.sha256_n)

    @overload
    def __getitem__(self, row: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[ImageRecord]: ...
    def __getitem__(self, row: int | slice) -> ImageRecord | Sequence[ImageRecord]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return self._prepared.read_record(range(len(self))[row])


def check_target(path: Path) -> None:
    """Refuse a file that `write_embeddings` may not write, before anything is computed. Raises SettingsError.

    Embeddings of an earlier call are replaced; any other file that is there may be somebody's work.
    """
    where = f"--out {path}"
    if path.suffix.lower() != SUFFIX:
        found = f"has the suffix {path.suffix}" if path.suffix else "has no suffix"
        raise SettingsError(where, found, f"a file *{SUFFIX}", f"Name it {path.with_suffix(SUFFIX).name}.")
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise SettingsError(where, f"lies below {folder}, which is a file", "a folder", "Name another one.")
    if path.exists() and not _holds_embeddings(path):
        todo = "Name another file, or remove this one."
        raise SettingsError(where, "is there already, and not from `embed --out`", "a new file", todo)


def write_embeddings(album: Album, path: Path) -> None:
    """Write an album as Parquet, whole or not at all; makes the folder. Raises SettingsError."""
    facts, pin, sha256_n = album.encoder.facts, album.prepared.pin, album.prepared.sha256_n
    vectors = make_schema(album.embedding_nd.shape[1], facts.digest)
    words = {"visionloop.encoder_words": facts.describe(), "visionloop.dataset": f"{pin.name} version {pin.version}"}
    columns = [("path", pa.string()), ("labels", pa.list_(pa.string())), ("side", pa.string()), *vectors]
    schema = pa.schema(columns, metadata={**vectors.metadata, **words})

    def make_group(start: int) -> pa.Table:
        rows = range(start, min(start + GROUP_ROWS, len(sha256_n)))
        seen = make_table(sha256_n[start : rows.stop], album.embedding_nd[start : rows.stop], vectors)
        known = [[album.get_origin(i) for i in rows], [album.prepared.labels(i) for i in rows]]
        known.append([album.records[i].side for i in rows])
        arrays = [pa.array(values, field.type) for values, field in zip(known, schema, strict=False)]
        return pa.Table.from_arrays([*arrays, *seen.columns], schema=schema)

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            for start in range(0, len(sha256_n), GROUP_ROWS):
                writer.write_table(make_group(start))

    try:
        write_through(path, write)
    except OSError as exc:
        raise SettingsError(f"--out {path}", f"cannot be written ({exc.strerror})", "a place to write to") from exc


def _holds_embeddings(path: Path) -> bool:
    try:
        return tuple(pq.read_schema(path).names) == COLUMNS
    except (OSError, pa.ArrowInvalid):
        return False


def _fit(record: AlbumRecord | ImageRecord, max_px: int) -> tuple[int, int]:
    """Return the size (height, width) at which an image fits a square; a smaller image keeps its size."""
    ratio = min(1.0, max_px / max(record.width, record.height))
    return max(1, round(record.height * ratio)), max(1, round(record.width * ratio))
