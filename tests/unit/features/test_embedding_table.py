"""The embedding table in the store, and the output of `embed`: whole or absent, checked, merged without loss."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from visionloop.data.shards import Prepared, Shards
from visionloop.errors import DatasetError
from visionloop.features.table import EmbeddingTable, remove_rows
from visionloop.features.view import EncoderFacts, describe_crop, load_features, write_empty, write_features
from visionloop.records import Pin
from visionloop.store import LocalStore
from worlds import list_encoders

FACTS = EncoderFacts(
    source="params",
    backbone="small_cnn",
    weights="none",
    weights_digest="ab" * 32,
    image_size=(32, 32),
    resize="squash",
    runtime="onnxruntime",
    precision="fp32",
)
RNG = np.random.default_rng(0)
SHAS = tuple(f"{i:064x}" for i in range(40))
VECTORS = RNG.normal(size=(40, 6)).astype(np.float32)


@pytest.fixture
def table(tmp_path: Path) -> EmbeddingTable:
    return EmbeddingTable(LocalStore(tmp_path / "store"), FACTS.digest)


def make_prepared(folder: Path, *, shas: tuple[str, ...] = SHAS, larger: bool = False) -> Prepared:
    shards = Shards((32, 32), 100, (np.zeros((len(shas), 32, 32, 3), np.uint8),))
    return Prepared(
        folder=folder,
        pin=Pin("pets", 1, "0" * 64, len(shas), ("a", "b")),
        task="binary",
        classes=("a", "b"),
        size_hw=(32, 32),
        resize="squash",
        sha256_n=shas,
        label_n=np.zeros(len(shas), np.int64),
        targets_nk=None,
        side_n=np.full(len(shas), "train"),
        place_n=np.arange(len(shas)),
        shards=shards,
        train_shards=replace(shards, size_hw=(40, 40)) if larger else None,
    )


def write_parts(table: EmbeddingTable, size: int) -> None:
    for i in range(0, 40, size):
        table.write(SHAS[i : i + size], VECTORS[i : i + size])


def test_what_was_written_is_found_in_the_order_asked_for(table: EmbeddingTable) -> None:
    write_parts(table, 10)
    order = RNG.permutation(40)
    embedding_nd, has_n = table.lookup([SHAS[i] for i in order])
    assert has_n.all()
    np.testing.assert_array_equal(embedding_nd, VECTORS[order])


def test_what_is_not_there_is_said(table: EmbeddingTable) -> None:
    embedding_nd, has_n = table.lookup(SHAS)
    assert embedding_nd is None
    assert not has_n.any()
    table.write(SHAS[5:7], VECTORS[5:7])
    embedding_nd, has_n = table.lookup(SHAS)
    assert embedding_nd is not None
    assert np.flatnonzero(has_n).tolist() == [5, 6]
    np.testing.assert_array_equal(embedding_nd[5:7], VECTORS[5:7])


def test_equal_rows_give_one_part_and_other_encoders_have_their_own(table: EmbeddingTable) -> None:
    assert table.write(SHAS[:3], VECTORS[:3]) == table.write(SHAS[:3], VECTORS[:3])
    assert len(table.list_parts()) == 1
    other = EmbeddingTable(table.store, replace(FACTS, resize="letterbox").digest)
    assert not other.lookup(SHAS)[1].any()
    other.write(SHAS[:3], VECTORS[:3])
    assert list_encoders(table.store) == sorted({table.encoder, other.encoder})


@pytest.mark.parametrize("damage", ["bytes", "cut", "encoder", "text", "nan"])
def test_a_damaged_part_is_passed_over_said_and_healed(table: EmbeddingTable, damage: str, tmp_path: Path) -> None:
    told: list[str] = []
    table = EmbeddingTable(table.store, FACTS.digest, tell=told.append)
    write_parts(table, 20)
    key = table.list_parts()[0]
    path = tmp_path / "store" / key
    data = path.read_bytes()
    if damage == "encoder":
        EmbeddingTable(table.store, "e" * 64).write(SHAS[:20], VECTORS[:20])
        data = table.store.get(EmbeddingTable(table.store, "e" * 64).list_parts()[0])
        path.unlink()
        import hashlib

        key = f"{key.rpartition('/')[0]}/{hashlib.sha256(data).hexdigest()}"
        table.store.put(key, data)
    elif damage == "nan":
        path.unlink()
        key = table.write(SHAS[:20], np.full((20, 6), np.nan, np.float32))
    else:
        path.write_bytes({"bytes": data[:-60] + b"x" * 60, "cut": data[:100], "text": b"<html>"}[damage])
    _, has_n = table.lookup(SHAS)
    assert has_n.sum() == 20
    assert table.damaged == {key}
    assert len(told) == 1
    assert told[0].startswith(f"part {key.rpartition('/')[2][:12]} of the embedding table ")
    missing = np.flatnonzero(~has_n)
    written = table.write([SHAS[i] for i in missing], VECTORS[missing])
    table.drop_damaged()
    assert (key in table.list_parts()) == (key == written)
    embedding_nd, has_n = EmbeddingTable(table.store, FACTS.digest).lookup(SHAS)
    assert has_n.all()
    np.testing.assert_array_equal(embedding_nd, VECTORS)


def test_vectors_of_another_length_are_passed_over(table: EmbeddingTable) -> None:
    table.write(SHAS[:5], VECTORS[:5])
    table.write(SHAS[5:], VECTORS[5:, :3])
    embedding_nd, has_n = table.lookup(SHAS)
    assert embedding_nd is not None
    assert has_n.sum() in {5, 35}
    assert len(table.damaged) == 1


def test_small_parts_are_merged_and_no_row_is_lost(table: EmbeddingTable) -> None:
    write_parts(table, 1)
    table.write(SHAS[:7], VECTORS[:7])  # images in two parts
    before = set(table.list_parts())
    assert table.merge(many=50) == 0
    reader = EmbeddingTable(table.store, FACTS.digest)
    reader.lookup(SHAS)
    assert reader.merge(many=8) == 41
    assert len(reader.list_parts()) == 1
    assert not before & set(reader.list_parts())
    embedding_nd, has_n = EmbeddingTable(table.store, FACTS.digest).lookup(SHAS)
    assert has_n.all()
    np.testing.assert_array_equal(embedding_nd, VECTORS)


def test_a_part_that_is_merged_while_it_is_read_is_found_where_it_went(table: EmbeddingTable) -> None:
    write_parts(table, 1)
    reader = EmbeddingTable(table.store, FACTS.digest)
    listed = reader.list_parts()
    other = EmbeddingTable(table.store, FACTS.digest)
    other.lookup(SHAS)
    other.merge(many=1)
    calls = iter([listed])
    real = reader.list_parts
    reader.list_parts = lambda: next(calls, None) or real()  # type: ignore[method-assign]
    _, has_n = reader.lookup(SHAS)
    assert has_n.all()


def test_two_that_merge_at_once_lose_nothing(table: EmbeddingTable) -> None:
    write_parts(table, 1)
    first, second = (EmbeddingTable(table.store, FACTS.digest) for _ in range(2))
    first.lookup(SHAS)
    second.lookup(SHAS)
    second.write(SHAS[3:9], VECTORS[3:9])
    first.merge(many=1)
    second.merge(many=1)
    assert EmbeddingTable(table.store, FACTS.digest).lookup(SHAS)[1].all()


def test_forgotten_rows_leave_every_part(table: EmbeddingTable) -> None:
    write_parts(table, 20)
    remove_rows(table.store, table.list_parts(), frozenset({SHAS[3], SHAS[30]}))
    _, has_n = table.lookup(SHAS)
    assert np.flatnonzero(~has_n).tolist() == [3, 30]
    remove_rows(table.store, table.list_parts(), frozenset(SHAS))
    assert table.list_parts() == []


def test_the_view_returns_what_was_written(tmp_path: Path) -> None:
    write_features(tmp_path, SHAS, VECTORS, FACTS)
    embedding_nd, facts = load_features(tmp_path, make_prepared(tmp_path))
    np.testing.assert_array_equal(embedding_nd, VECTORS)
    assert embedding_nd.dtype == np.float32
    assert embedding_nd.flags.c_contiguous
    assert facts == FACTS
    first = (tmp_path / "embeddings.parquet").read_bytes()
    write_features(tmp_path, SHAS, VECTORS, FACTS)
    assert (tmp_path / "embeddings.parquet").read_bytes() == first


def test_a_view_that_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path)

    def refuse(match: str, of: Prepared = prepared) -> None:
        with pytest.raises(DatasetError, match=match) as caught:
            load_features(tmp_path / "features", of)
        assert str(caught.value).endswith("Run `visionloop embed`.")

    folder = tmp_path / "features"
    folder.mkdir()
    refuse("are missing")
    write_empty(folder)
    refuse("are empty: `train.way` did not need any")
    write_features(folder, SHAS, VECTORS, FACTS)
    refuse("are those of other images", make_prepared(tmp_path, shas=SHAS[:-1]))
    refuse("are those of other images", make_prepared(tmp_path, shas=SHAS[::-1]))
    refuse("another size or resize rule", replace(prepared, resize="letterbox"))
    (folder / "encoder.json").write_text(json.dumps({"needed": True, "encoder": {**FACTS.to_json(), "resize": "x"}}))
    refuse("belong to another encoder than encoder.json says")
    for text in ("", "[]", '{"needed": true}', '{"needed": true, "encoder": 3}', '{"needed": true, "encoder": {}}'):
        (folder / "encoder.json").write_text(text)
        refuse("are damaged")
    write_features(folder, SHAS, VECTORS, FACTS)
    (folder / "embeddings.parquet").write_bytes(b"PAR1")
    refuse("are damaged")


def test_the_digest_follows_all_that_changes_an_embedding() -> None:
    others = [
        replace(FACTS, weights_digest="cd" * 32),
        replace(FACTS, image_size=(32, 40)),
        replace(FACTS, resize="letterbox"),
        replace(FACTS, runtime="openvino"),
        replace(FACTS, precision="bf16"),
        replace(FACTS, crop={"dataset": "pets", "train_size": [40, 40]}),
        replace(FACTS, source="f" * 64),
        replace(FACTS, version=FACTS.version + 1),
    ]
    assert len({f.digest for f in (FACTS, *others)}) == len(others) + 1
    assert replace(FACTS, weights="other.pth").digest == FACTS.digest, "the same weights under another name"
    assert EncoderFacts.from_json(json.loads(json.dumps(FACTS.to_json()))) == FACTS


def test_a_larger_training_side_belongs_to_its_dataset(tmp_path: Path) -> None:
    assert describe_crop(make_prepared(tmp_path)) == {}
    assert describe_crop(make_prepared(tmp_path, larger=True)) == {"dataset": "pets", "train_size": [40, 40]}


def test_merging_into_a_part_that_is_there_keeps_it(table: EmbeddingTable) -> None:
    whole = table.write(SHAS[:10], VECTORS[:10])
    table.write(SHAS[:4], VECTORS[:4])
    assert table.merge(many=1) == 2
    assert table.list_parts() == [whole]
    assert table.lookup(SHAS[:10])[1].all()
