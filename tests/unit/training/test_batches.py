"""Batches: what an epoch holds for each rank, the same whoever reads it, and what crops and padding do."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from arrays import make_job, make_prepared, sort_by_row
from visionloop.data.shards import Prepared
from visionloop.errors import DatasetError
from visionloop.training.augment import count_turns, draw_bits, draw_uniform, make_image_keys
from visionloop.training.batches import (
    PADDING,
    Augmentation,
    Batches,
    BatchRows,
    check_world,
    count_parts,
    frame_images,
    read_whole,
)
from visionloop.training.datamodule import Loader, PreparedData
from visionloop.training.ranks.world import World


def read_epoch(sampler: BatchRows, epoch: int) -> list[np.ndarray]:
    sampler.set_epoch(epoch)
    return [key.rows_n for key in sampler]


@pytest.mark.parametrize(
    ("number", "step_size", "parts"), [(10, 4, 1), (10, 4, 2), (7, 100, 3), (1, 1, 1), (64, 16, 4)]
)
def test_an_epoch_holds_each_image_once_in_batches_that_differ_by_one(number: int, step_size: int, parts: int) -> None:
    sampler = BatchRows(np.arange(100, 100 + number), step_size, seed=0, parts=parts)
    batches = read_epoch(sampler, 0)
    assert len(batches) == len(sampler) == -(-number // step_size) * parts
    assert sorted(np.concatenate(batches)) == list(range(100, 100 + number))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= -(-step_size // parts)


def test_the_order_is_another_one_in_each_epoch_and_for_each_seed_and_the_same_again() -> None:
    rows = np.arange(200)
    order = [np.concatenate(read_epoch(BatchRows(rows, 32, seed), epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all((a != b).mean() > 0.9 for a, b in ((order[0], order[1]), (order[0], order[2]), (order[1], order[2])))
    assert (order[1] == np.concatenate(read_epoch(BatchRows(rows, 7, 0), 1))).all(), "whatever the batch size"


def test_one_more_image_leaves_the_others_in_their_order() -> None:
    key_n = make_image_keys([f"{i:064x}" for i in range(50)])
    whole = np.concatenate(read_epoch(BatchRows(np.arange(50), 8, 3, key_n=key_n), 2))
    rows = np.delete(np.arange(50), 17)
    assert (whole[whole != 17] == np.concatenate(read_epoch(BatchRows(rows, 8, 3, key_n=key_n[rows]), 2))).all()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_each_batch_and_take_equally_many_steps(size: int, parts: int) -> None:
    rows = np.arange(50)
    whole = read_epoch(BatchRows(rows, 12, 0, parts=parts), 4)
    ranks = [read_epoch(BatchRows(rows, 12, 0, parts=parts, world=World(rank, size)), 4) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for number, batch in enumerate(whole):
        shares = [batches[number] for batches in ranks]
        assert all(len(share) for share in shares)
        assert sorted(np.concatenate(shares)) == sorted(batch)
        assert (shares[0] == batch[::size]).all()


@pytest.mark.parametrize("number", [1, 2, 10, 13])
def test_validation_is_padded_so_that_all_ranks_take_equally_many(number: int) -> None:
    ranks = [read_epoch(BatchRows(np.arange(number), 4, None, world=World(rank, 3)), 0) for rank in range(3)]
    assert {tuple(len(batch) for batch in batches) for batches in ranks} == {tuple(len(b) for b in ranks[0])}
    seen = np.concatenate([np.concatenate(batches) for batches in ranks])
    assert sorted(seen[seen != PADDING]) == list(range(number))
    assert (np.concatenate(read_epoch(BatchRows(np.arange(number), 4, None), 0)) == np.arange(number)).all()


def test_no_rows_are_no_batches() -> None:
    sampler = BatchRows(np.arange(0), 4, None)
    assert (len(sampler), list(sampler)) == (0, [])


def test_weights_draw_with_replacement_and_say_how_often_an_image_came_before() -> None:
    weights_n = np.r_[np.full(90, 1.0), np.full(10, 9.0)]
    sampler = BatchRows(np.arange(100), 10, 0, weights_n=weights_n)
    sampler.set_epoch(0)
    keys = list(sampler)
    rows = np.concatenate([key.rows_n for key in keys])
    assert len(rows) == 100
    drawn = [np.concatenate(read_epoch(sampler, epoch)) for epoch in range(40)]
    assert np.mean(np.concatenate(drawn) >= 90) == pytest.approx(0.5, abs=0.03), "half of the weight, half of the draws"
    assert (drawn[0] == rows).all()
    assert (np.concatenate([key.turns_n for key in keys]) == count_turns(rows)).all()


def test_turns_count_what_came_before() -> None:
    assert count_turns(np.asarray([4, 7, 4, 4, 7])).tolist() == [0, 0, 1, 2, 1]
    assert count_turns(np.asarray([], np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("number", "step_size", "in_memory", "world_size", "parts"),
    [
        (100, 32, 32, 1, 1),
        (100, 32, 16, 1, 2),
        (100, 32, 4, 1, 7),
        (3, 32, 1, 1, 3),
        (3, 32, 32, 1, 1),
        (100, 8, 1, 4, 1),
    ],
)
def test_a_step_is_taken_in_as_many_parts_as_memory_asks_for(
    number: int, step_size: int, in_memory: int, world_size: int, parts: int
) -> None:
    assert count_parts(number, step_size, in_memory, world_size) == parts
    sizes = [len(b) for b in read_epoch(BatchRows(np.arange(number), step_size, 0, parts=parts), 0)]
    assert min(sizes) >= world_size
    assert max(sizes) <= max(in_memory, 2 * world_size)


def test_more_ranks_than_images_is_refused() -> None:
    check_world(np.arange(16), 8, World(size=8))
    with pytest.raises(DatasetError, match=r"16 ranks for 10 training images in batches of 5 to 8; .*Use 10 devices"):
        check_world(np.arange(10), 8, World(size=16))
    with pytest.raises(DatasetError, match=r"Use fewer devices, or set train.batch_size to 16 or more\."):
        check_world(np.arange(100), 8, World(size=16))
    with pytest.raises(DatasetError, match="1 ranks for 0 training images"):
        check_world(np.arange(0), 8, World())


def test_draws_are_uniform_and_belong_to_seed_epoch_image_and_turn() -> None:
    key_n = make_image_keys([f"image {i}" for i in range(4000)])
    assert len(set(key_n.tolist())) == 4000

    def draw(seed: int = 0, epoch: int = 0, turn: int = 0) -> np.ndarray:
        bits_n = draw_bits(key_n, seed=seed, epoch=epoch, purpose=2)
        return draw_uniform(bits_n, 8, np.full(4000, turn))

    u_nd = draw()
    assert ((u_nd >= 0) & (u_nd < 1)).all()
    assert np.abs(np.histogram(u_nd, 20, (0, 1))[0] / u_nd.size - 0.05).max() < 0.004
    others = [draw(seed=1), draw(epoch=1), draw(turn=1), draw(seed=2**70)]
    flat = np.stack([u_nd, *others]).reshape(5, -1)
    together = np.corrcoef(np.concatenate([flat, np.roll(u_nd, 1, axis=1).reshape(1, -1)]))
    assert np.abs(together - np.eye(6)).max() < 0.03, "no draw tells of another"
    assert (u_nd == draw()).all()


@pytest.mark.parametrize("done_by", ["loader", "device"])
@pytest.mark.parametrize("preset", ["none", "medium"])
def test_an_image_comes_out_the_same_whatever_its_batch(tmp_path: Path, preset: str, done_by: str) -> None:
    prepared = make_prepared(tmp_path, train_px=40)
    rows = prepared.rows("train")
    key_n = make_image_keys(prepared.sha256_n)
    batches = Batches(prepared, Augmentation(preset, 5, done_by), key_n)
    seen = []
    for step_size, world in ((4, World()), (9, World(1, 2)), (9, World(0, 2))):
        sampler = BatchRows(rows, step_size, 5, key_n=key_n[rows], world=world)
        sampler.set_epoch(3)
        seen.append(sort_by_row([batches[key] for key in sampler]))
    whole, first, second = seen
    for rows_n, inputs, draws in (first, second):
        picks = np.searchsorted(whole[0], rows_n)
        assert (whole[1][picks] == inputs).all()
        if done_by == "device":
            assert (whole[2][picks] == draws).all()
    assert sorted([*first[0], *second[0]]) == whole[0].tolist()


def test_crops_differ_from_epoch_to_epoch_and_validation_sees_the_middle(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path, train_px=40)
    data = PreparedData(make_job(prepared, seed=3), 16)

    def read(loader: Loader, epoch: int) -> np.ndarray:
        loader.sampler.set_epoch(epoch)
        return sort_by_row(list(loader))[1]

    first, second = (read(data.train_dataloader(), epoch) for epoch in (0, 1))
    assert first.shape == (len(prepared.rows("train")), 32, 32, 3)
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.9
    assert (second == read(data.train_dataloader(), 1)).all(), "a resumed run sees what it would have seen"
    assert (read(data.val_dataloader(), 0) == prepared.read(prepared.rows("val"))).all()


def test_all_sides_together_are_read_and_augmented(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path, train_px=40)
    data = PreparedData(make_job(prepared, on="all", monitor="train/loss", augment="medium"), 8)
    rows, inputs, _ = sort_by_row(list(data.train_dataloader()))
    assert (rows == np.arange(30)).all()
    assert inputs.shape == (30, 32, 32, 3)
    assert len(data.val_dataloader()) == 0


def test_padding_is_black_of_class_zero_and_marked(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path)
    batches = Batches(prepared, Augmentation(), make_image_keys(prepared.sha256_n))
    rows = prepared.rows("val")[:2]
    (key,) = BatchRows(rows, 8, None, world=World(1, 3))
    one = batches[key]
    assert (one.rows_n.tolist(), one.targets.tolist()) == ([rows[1]], [prepared.label_n[rows[1]]])
    (key,) = BatchRows(rows, 8, None, world=World(2, 3))
    none = batches[key]
    assert (none.rows_n.tolist(), none.targets.tolist(), int(none.inputs.sum())) == ([PADDING], [0], 0)


def test_a_smaller_image_lies_in_the_middle_mirrored_beyond_its_edges(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path, train_px=40)
    rows = np.asarray([prepared.rows("train")[0], prepared.rows("val")[0]])
    whole = read_whole(prepared, rows)
    assert whole.shape == (2, 40, 40, 3)
    assert frame_images(prepared, rows).tolist() == [[0, 0, 40, 40], [4, 4, 32, 32]]
    assert (whole[1, 4:36, 4:36] == prepared.read(rows[1:])[0]).all()
    assert (whole[1, :4, 4:36] == whole[1, 4:8, 4:36][::-1]).all()
    assert (whole[0] == prepared.train_shards.read(prepared.place_n[rows[:1]])[0]).all()


def test_batches_travel_to_another_process_without_their_images(tmp_path: Path) -> None:
    prepared: Prepared = make_prepared(tmp_path, number=400)
    batches = Batches(prepared, Augmentation("light", 0), make_image_keys(prepared.sha256_n))
    data = pickle.dumps(batches)
    assert len(data) < 100_000 < prepared.shards.arrays[0].nbytes
    (key,) = BatchRows(prepared.rows("train")[:6], 6, 0)
    assert (pickle.loads(data)[key].inputs == batches[key].inputs).all()
