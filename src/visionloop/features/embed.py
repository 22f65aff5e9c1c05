"""The stage `embed`: prepared arrays to features/, by way of the embedding table. Empty unless the way needs it.

Resumable by batch: what was computed is in the table. Same input, same bytes.

Dimensions: n images, h height, w width, d features.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from visionloop.data.images import UInt8Array
from visionloop.data.manifest import make_image_key, make_lost_error
from visionloop.data.shards import IntArray, Prepared, load_prepared
from visionloop.errors import ImageError, ObjectMissing, TrainingError
from visionloop.features.encoder import Encoder, describe_weights, make_encoder
from visionloop.features.table import EmbeddingTable
from visionloop.features.view import EncoderFacts, FloatArray, describe_crop, write_empty, write_features
from visionloop.parallel import map_parallel
from visionloop.params import WAYS_ON_EMBEDDINGS
from visionloop.records import compute_digest
from visionloop.store import ObjectStore
from visionloop.workfolder import lock_work, replace_folder
from visionloop.workspace import Workspace

# Two batches are in memory at a time; of large images fewer go into one.
BATCH_BYTES = 256 * 1024 * 1024
ReadImages = Callable[[IntArray], UInt8Array]


def embed_prepared(
    table: EmbeddingTable,
    encoder: Encoder,
    prepared: Prepared,
    read: ReadImages,
    *,
    batch_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FloatArray:
    """Return the embeddings of all prepared images, (n, d), in their order: from the table, the rest computed into it.

    Raises:
        TrainingError: the network gives no finite numbers.
        StoreError: the store cannot be read or written.
    """
    embedding_nd, has_n = table.lookup(prepared.sha256_n)
    done, total = int(has_n.sum()), len(has_n)
    on_progress(done, total)
    missing = np.flatnonzero(~has_n)
    height, width = encoder.facts.image_size
    step = max(1, min(batch_size, BATCH_BYTES // (height * width * 3)))
    batches = [missing[i : i + step] for i in range(0, len(missing), step)]
    for rows, images_nhwc in _read_ahead(read, batches):
        computed = encoder.embed(images_nhwc)
        if not np.isfinite(computed).all():
            number = int((~np.isfinite(computed).all(axis=1)).sum())
            raise TrainingError(
                f"encoder {encoder.facts.describe()}",
                f"gives no finite embedding for {number} of {len(rows)} images",
                "numbers",
                "Check the file of train.weights.",
            )
        if embedding_nd is not None and embedding_nd.shape[1] != computed.shape[1]:
            # Rows of another length under this digest are none of this encoder's.
            raise TrainingError(
                f"embedding table {encoder.facts.digest[:12]}",
                f"holds vectors of {embedding_nd.shape[1]}",
                f"{computed.shape[1]}",
                f"Remove embeddings/{encoder.facts.digest} from the store.",
            )
        if embedding_nd is None:
            embedding_nd = np.empty((total, computed.shape[1]), np.float32)
        embedding_nd[rows] = computed
        table.write([prepared.sha256_n[row] for row in rows], computed)
        done += len(rows)
        on_progress(done, total)
    table.drop_damaged()
    assert embedding_nd is not None  # prepared data has an image
    return embedding_nd


def choose_reader(
    store: ObjectStore,
    encoder: Encoder,
    prepared: Prepared,
    get_origin: Callable[[int], str] = lambda row: "of an earlier version",
) -> ReadImages:
    """Return what reads images as the encoder takes them: from the prepared arrays if they fit, else from the store.

    `get_origin` names images in messages, by row.
    """
    facts = encoder.facts
    fits = (facts.image_size, facts.resize) == (prepared.size_hw, prepared.resize)
    if fits and facts.crop == describe_crop(prepared):
        return prepared.read

    def decode(row: int) -> UInt8Array:
        sha256 = prepared.sha256_n[row]
        origin = get_origin(row)
        try:
            return encoder.decode(store.get(make_image_key(sha256)), f"image {sha256[:12]} ({origin})")
        except (ImageError, ObjectMissing) as exc:
            raise make_lost_error(sha256, origin) from exc

    return lambda rows: np.stack(list(map_parallel(decode, [int(row) for row in rows])))


def _read_ahead(read: ReadImages, batches: Sequence[IntArray]) -> Iterator[tuple[IntArray, UInt8Array]]:
    """Yield each batch with its images; the next one is read while this one is computed, and no more than that."""
    waiting = iter(batches)
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        rows = next(waiting, None)
        ahead = pool.submit(read, rows) if rows is not None else None
        while rows is not None and ahead is not None:
            images_nhwc = ahead.result()
            following = next(waiting, None)
            ahead = pool.submit(read, following) if following is not None else None
            yield rows, images_nhwc
            rows = following


@dataclass(frozen=True)
class Embedded:
    """What the stage made: the encoder (None: the way needs no embeddings), images in all, and those computed now."""

    facts: EncoderFacts | None
    num_images: int = 0
    num_computed: int = 0


def embed(
    workspace: Workspace,
    *,
    tell: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Write the embeddings of all prepared images into features/, computing those that the table does not have.

    Raises:
        DatasetError: there is no prepared data, or it was made for another pin.
        TrainingError: the backbone or its weights are unusable.
        ParamsError: the runtime cannot be had.
    """
    settings, params = workspace.settings, workspace.params
    if params.train.way not in WAYS_ON_EMBEDDINGS:
        with lock_work(settings.work_dir("embed"), "none") as work:
            write_empty(work)
            replace_folder(work, settings.features_dir)
        return Embedded(None)
    prepared = load_prepared(settings.prepared_dir)
    encoder = make_encoder(workspace, prepared, tell=tell)
    facts = encoder.facts
    tell(f"encoder {facts.digest[:12]}: {facts.describe()}")
    if warning := describe_weights(params.train):
        tell(warning)
    counts: list[int] = []

    def count(done: int, total: int) -> None:
        counts.append(done)
        on_progress(done, total)

    with lock_work(settings.work_dir("embed"), compute_digest([facts.digest, prepared.pin.digest])) as work:
        table = EmbeddingTable(workspace.store, facts.digest, tell=tell)
        embedding_nd = embed_prepared(
            table,
            encoder,
            prepared,
            choose_reader(workspace.store, encoder, prepared),
            batch_size=params.embed.batch_size,
            on_progress=count,
        )
        write_features(work, prepared.sha256_n, embedding_nd, facts)
        replace_folder(work, settings.features_dir)
        table.merge()
    return Embedded(facts, counts[-1], counts[-1] - counts[0])
