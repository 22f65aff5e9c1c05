"""Vectors that are kept in a file: exact answers from bytes, whatever the vectors are; damage, staleness, a kill."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visionloop.errors import DatasetError
from visionloop.features import kept
from visionloop.features.kept import DamagedVectors, KeptVectors, compute_num_bytes, make_key, write_vectors
from visionloop.features.neighbours import find_neighbours

KEY = make_key("encoder", ["a", "b"])
BLOCK = 512


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "BLOCK_ROWS", BLOCK)
    monkeypatch.setattr(kept, "STEP_ROWS", 100)


def make_vectors(kind: str, number: int = 3000, d: int = 48) -> np.ndarray:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(number, d))
    if kind == "clusters":
        vectors = 3 * rng.normal(size=(20, d))[rng.integers(0, 20, number)] + vectors
    elif kind == "of a network":  # few directions, none negative, some far larger than the others, equal ones
        vectors = np.maximum(rng.normal(size=(number, 6)) @ rng.normal(size=(6, d)) + 0.1 * vectors, 0)
        vectors[:, :2] *= 30
        vectors[rng.integers(0, number, 300)] = vectors[rng.integers(0, number, 300)]
    elif kind == "nearly equal":  # nearer to each other than a byte tells
        vectors = 1 + 1e-4 * vectors
    elif kind == "some without length":
        vectors[::7] = 0
    elif kind == "all equal":
        vectors = np.ones((number, d))
    elif kind == "long and short":
        vectors[:5] *= [[1e25], [1e-25], [1e18], [1e-18], [1]]
    return vectors.astype(np.float32)


def keep(path: Path, vectors: np.ndarray) -> KeptVectors:
    write_vectors(path, KEY, vectors)
    return KeptVectors(path, KEY)


KINDS = ("random", "clusters", "of a network", "nearly equal", "some without length", "all equal", "long and short")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_all_vectors(tmp_path: Path, kind: str) -> None:
    vectors = make_vectors(kind)
    found = keep(tmp_path / "vectors", vectors)
    np.testing.assert_array_equal(found.vectors_nd, vectors)
    rng = np.random.default_rng(1)
    near = vectors[rng.integers(0, 3000, 16)] + rng.normal(size=(16, 48)).astype(np.float32) * np.float32(0.05)
    for query in (vectors[7:8], vectors[14:15], near, -near[:2], rng.normal(size=(17, 48)).astype(np.float32)):
        distance, row = found.find(query, 9)
        exact_distance, exact_row = find_neighbours(query, vectors, 9)
        np.testing.assert_allclose(distance, exact_distance, atol=1e-6)
        different = row != exact_row  # equals may change places, and so may those that 32 bits do not tell apart
        np.testing.assert_allclose(distance[different], exact_distance[different], atol=1e-6)
        if kind in ("random", "clusters"):
            assert not different.any()


def test_few_vectors_are_read_for_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is narrow: of 3,000 random vectors at most a tenth may be among the nearest 9."""
    vectors = make_vectors("random")
    found = keep(tmp_path / "vectors", vectors)
    chosen = [len(found._choose(query[None] / np.linalg.norm(query), 9)) for query in vectors[:20]]
    assert min(chosen) >= 9
    assert np.mean(chosen) < 300


def test_the_bound_holds_for_each_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound of a tenth, nearest ones are missed: what is tested here is tested."""
    vectors = make_vectors("of a network")
    query = vectors[:16] + np.float32(0.3)
    exact = find_neighbours(query, vectors, 9)[1]
    found = keep(tmp_path / "vectors", vectors)
    unit = query / np.linalg.norm(query, axis=1, keepdims=True)
    assert set(exact.ravel()) <= set(found._choose(unit, 9))
    found._arrays["numbers"] = found._arrays["numbers"] * np.array([[1], [0.0], [0.0], [1]], np.float32)
    assert not set(exact.ravel()) <= set(found._choose(unit, 9))


@pytest.mark.parametrize(
    ("query", "nearest", "other"),
    [
        # What rounding the vector loses points to the question: its bytes say 127, it is 130.43; the other is 130.
        ([1] * 8, [127, *[0.49] * 7], [127, 1, 1, 1, 0, 0, 0, 0]),
        # The same of the question: the cosines are 0.304 and 0.287, by bytes 0.285 and 0.287.
        ([63, *[0.49] * 7], [100, *[127] * 7], [54, 127, -127, 0, 0, 0, 0, 0]),
    ],
)
def test_what_rounding_loses_hides_no_neighbour(
    tmp_path: Path, query: list[float], nearest: list[float], other: list[float]
) -> None:
    vectors = np.array([other, nearest], np.float32)
    found = keep(tmp_path / "vectors", np.concatenate([vectors, -vectors]))  # their mean is 0
    asked = np.array([query], np.float32)
    assert find_neighbours(asked, vectors, 1)[1].tolist() == [[1]]
    assert found.find(asked, 1)[1].tolist() == [[1]]


def test_as_many_as_there_are_and_what_cannot_be_asked(tmp_path: Path) -> None:
    vectors = make_vectors("random", 600)
    found = keep(tmp_path / "vectors", vectors)
    assert found.find(vectors[:2], 600)[1].shape == (2, 600)
    assert found.find(vectors[:2], 900)[1].shape == (2, 600)
    assert found.find(vectors[:0], 3)[1].shape == (0, 3)
    with pytest.raises(DatasetError, match=r"shape \(2, 8\) for a table of shape \(1, 48\)"):
        found.find(vectors[:2, :8], 3)
    with pytest.raises(DatasetError, match="1 queries are not finite"):
        found.find(np.full((1, 48), np.nan, np.float32), 3)
    with pytest.raises(DatasetError, match="got k = 0; expected 1 or more"):
        found.find(vectors[:1], 0)
    with pytest.raises(DatasetError, match="1 vectors of the table are not finite"):
        write_vectors(tmp_path / "other", KEY, np.array([[1, 2], [np.inf, 1]], np.float32))
    assert not (tmp_path / "other").exists()


def test_the_size_of_the_file_is_known_before_it_is_written(tmp_path: Path) -> None:
    keep(tmp_path / "vectors", make_vectors("random", 1100))
    assert (tmp_path / "vectors").stat().st_size == compute_num_bytes(1100, 48)
    assert compute_num_bytes(1_000_000, 512) < 1.3 * 4 * 512_000_000


def test_vectors_of_other_images_or_another_encoder_are_not_opened(tmp_path: Path) -> None:
    keep(tmp_path / "vectors", make_vectors("random", 600))
    others = [make_key("other", ["a", "b"]), make_key("encoder", ["b", "a"]), make_key("encoder", ["a"])]
    assert len({KEY, *others}) == 4
    for key in others:
        with pytest.raises(DamagedVectors, match="of other images"):
            KeptVectors(tmp_path / "vectors", key)


@pytest.mark.parametrize("length", [0, 3, 4095, 5000, -4096, -1, 1])
def test_a_file_that_was_cut_or_grew_is_not_opened(tmp_path: Path, length: int) -> None:
    path = tmp_path / "vectors"
    keep(path, make_vectors("random", 600))
    data = path.read_bytes()
    path.write_bytes(data[:length] if length != 1 else data + b"\0")
    with pytest.raises((DamagedVectors, OSError, ValueError)):
        KeptVectors(path, KEY)


@pytest.mark.parametrize("head", [b"[]", b"{}", b'{"key": 1', b"\xff\xfe", b'{"num_images": -1, "num_features": 2}'])
def test_a_head_that_is_none_is_damage(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "vectors"
    keep(path, make_vectors("random", 600))
    path.write_bytes(head + b"\n" + path.read_bytes()[len(head) + 1 :])
    with pytest.raises(DamagedVectors):
        KeptVectors(path, KEY)


def test_damage_is_found_where_it_is_read(tmp_path: Path) -> None:
    """A bit of each array: of what says where the vectors lie at once, of the bytes by any question, of a vector by a
    question that reads it."""
    path, vectors = tmp_path / "vectors", make_vectors("random", 1500)
    keep(path, vectors)
    data = path.read_bytes()
    for name, (place, _, _) in kept._Layout(1500, 48).arrays.items():
        at = place + (48 * 4 * 7 + 2 if name == "vectors" else 48 * 700 if name == "bytes" else 16)
        path.write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        if name not in ("bytes", "vectors"):
            with pytest.raises(DamagedVectors):
                KeptVectors(path, KEY)
            continue
        found = KeptVectors(path, KEY)
        with pytest.raises(DamagedVectors):
            found.find(vectors[7:8], 3)
    path.write_bytes(data)
    assert KeptVectors(path, KEY).find(vectors[7:8], 3)[1][0, 0] == 7


def test_a_killed_writer_leaves_what_was_there_before(tmp_path: Path) -> None:
    path, vectors = tmp_path / "vectors", make_vectors("random", 600)
    keep(path, vectors)
    code = f"""
import os, signal
import numpy as np
from visionloop.features import kept
whole = kept._round
def die(rest_bd, mean_d, calls=[]):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(rest_bd, mean_d)
kept._round = die
kept.write_vectors(kept.Path({str(path)!r}), "new", np.ones((5000, 8), np.float32))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert KeptVectors(path, KEY).find(vectors[5:6], 1)[1].tolist() == [[5]]
    write_vectors(path, "new", vectors)
    assert [one.name for one in tmp_path.iterdir()] == ["vectors"]


def test_the_memory_of_writing_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """But for 28 bytes a row."""
    import tracemalloc

    def measure(number: int) -> int:
        vectors = make_vectors("random", number)
        tracemalloc.start()
        write_vectors(tmp_path / "vectors", KEY, vectors)
        peak: Any = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return int(peak)

    assert measure(20_000) - measure(5_000) < 70 * 15_000
