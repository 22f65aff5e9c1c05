"""The stage `embed`: prepared arrays to features/, by way of the embedding table. Empty unless the way needs it.

Resumable by batch: what was computed is in the table. Same input, same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from visionloop.data.shards import load_prepared
from visionloop.features.encoder import describe_weights, make_encoder
from visionloop.features.facts import EncoderFacts
from visionloop.features.fill import choose_reader, embed_prepared
from visionloop.features.table import Table
from visionloop.features.view import write_empty, write_features
from visionloop.params import WAYS_ON_EMBEDDINGS, Params
from visionloop.records import compute_digest
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.workfolder import lock_work, replace_folder


@dataclass(frozen=True)
class Embedded:
    """What the stage made: the encoder (None: the way needs no embeddings), images in all, and those computed now."""

    facts: EncoderFacts | None
    num_images: int = 0
    num_computed: int = 0


def embed(
    settings: Settings,
    params: Params,
    store: ObjectStore,
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
    if params.train.way not in WAYS_ON_EMBEDDINGS:
        with lock_work(settings.work_dir("embed"), "none") as work:
            write_empty(work)
            replace_folder(work, settings.features_dir)
        return Embedded(None)
    prepared = load_prepared(settings.prepared_dir)
    encoder = make_encoder(settings, params, prepared)
    facts = encoder.facts
    tell(f"encoder {facts.digest[:12]}: {facts.describe()}")
    if warning := describe_weights(params.train):
        tell(warning)
    counts: list[int] = []

    def count(done: int, total: int) -> None:
        counts.append(done)
        on_progress(done, total)

    with lock_work(settings.work_dir("embed"), compute_digest([facts.digest, prepared.pin.digest])) as work:
        table = Table(store, facts.digest, tell=tell)
        embedding_nd = embed_prepared(
            table,
            encoder,
            prepared,
            choose_reader(store, encoder, prepared, {}),
            batch_size=params.embed.batch_size,
            on_progress=count,
        )
        write_features(work, prepared.sha256_n, embedding_nd, facts)
        replace_folder(work, settings.features_dir)
        table.merge()
    return Embedded(facts, counts[-1], counts[-1] - counts[0])
