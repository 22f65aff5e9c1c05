"""The embeddings of prepared data in one file, for questions about few images: exact, from a quarter of the bytes.

.visionloop/features/vectors    a line of JSON, then arrays, each at a multiple of 4,096 bytes (`_Layout`)

Beside the vectors themselves each has a copy of a byte a number. A question reads the copies, one product of small
integers in ONNX Runtime, and then the few vectors that may be among the nearest. None is missed: the cosine of unit
vectors q and x, with mean m of the table, is q m + m (x - m) + (q - m)(x - m), and in the last term x - m is s c + e,
c the bytes and s a scale, and q - m is t u + f. So (q - m)(x - m) is s t u c, and at most |q - m| |e| + |f| s |c| away
from it (Cauchy and Schwarz). Example: 512 numbers, normal: the bound is 0.025, and of 10^6 vectors 700 are looked at.

What is read is checked. Of the copies the products must add up to that with their sum (Huang and Abraham, 1984), of
the vectors the words, of the other arrays the digest. Damage raises `DamagedVectors`: the file is to be made anew.

Dimensions: m queries, n images, d features, b rows of a block.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from visionloop.errors import DatasetError
from visionloop.features.neighbours import (
    MOST_NEAR,
    ROUNDING,
    DoubleArray,
    FloatArray,
    IntArray,
    check_vectors,
    choose_near,
    find_neighbours,
    scale,
)
from visionloop.predictor import open_session
from visionloop.records import compute_digest
from visionloop.workfolder import write_through

VERSION = 1
BLOCK_ROWS = 16_384
STEP_ROWS = 512  # that are rounded at a time: they stay in the cache
PAGE = 4096
MOST_QUERIES = 16  # at once: for more the vectors themselves are as fast
# Bytes of an image up to 127, of a question up to 63: where a CPU adds two products in 16 bits, they still fit.
MOST_BYTE, MOST_ASKED = 127, 63


class DamagedVectors(DatasetError):
    """What is kept is not what was written."""


def make_key(encoder: str, sha256_n: Sequence[str]) -> str:
    """Return what kept vectors are of: an encoder and images, in their order. Their vectors follow from these."""
    return compute_digest([VERSION, encoder, hashlib.sha256("\n".join(sha256_n).encode()).hexdigest()])


class _Layout:
    """Where the arrays of n vectors of d numbers lie in the file. `numbers`: s, |e|, s |c| and m (x - m) of each."""

    def __init__(self, num_images: int, num_features: int) -> None:
        blocks = -(-num_images // BLOCK_ROWS)
        self.arrays: dict[str, tuple[int, tuple[int, ...], str]] = {}
        self.num_bytes = PAGE
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "mean": ((num_features,), "<f4"),
            "numbers": ((4, num_images), "<f4"),
            "sums": ((num_images,), "<i4"),  # of the bytes of each image
            "words": ((num_images,), "<u4"),  # the sum of the words of each vector
            "columns": ((blocks, num_features), "<i4"),  # the sum of the bytes of a block, by feature
            "bytes": ((num_images * num_features,), "|i1"),  # of each block (d, b)
            "vectors": ((num_images, num_features), "<f4"),
        }
        for name, (shape, kind) in shapes.items():
            self.arrays[name] = self.num_bytes, shape, kind
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            self.num_bytes += -(-size // PAGE) * PAGE


_SMALL = ("mean", "numbers", "sums", "words", "columns")


def compute_num_bytes(num_images: int, num_features: int) -> int:
    """Return the size of the file."""
    return _Layout(num_images, num_features).num_bytes


def write_vectors(path: Path, key: str, vectors_nd: FloatArray) -> None:
    """Write the file, whole or not at all. Raises OSError, and DatasetError where vectors are not finite."""
    write_through(path, lambda file: _write(file, key, vectors_nd))


def _write(file: BinaryIO, key: str, vectors_nd: FloatArray) -> None:
    (number, size), layout = vectors_nd.shape, _Layout(*vectors_nd.shape)
    small: dict[str, NDArray[Any]] = {name: np.zeros(*layout.arrays[name][1:]) for name in _SMALL}
    small["mean"][:] = mean_d = _compute_mean(vectors_nd)

    def put(name: str, place: int, array: NDArray[Any]) -> None:
        file.seek(layout.arrays[name][0] + place)
        file.write(array.data)

    for block, start in enumerate(range(0, number, BLOCK_ROWS)):
        byte_db = np.empty((size, min(BLOCK_ROWS, number - start)), np.int8)
        for first in range(start, min(number, start + BLOCK_ROWS), STEP_ROWS):
            some_bd = np.ascontiguousarray(vectors_nd[first : min(first + STEP_ROWS, start + BLOCK_ROWS)], "<f4")
            mine = slice(first, first + len(some_bd))
            rest_bd = scale(some_bd)[0] - mean_d
            byte_bd, small["numbers"][:, mine] = _round(rest_bd, mean_d)
            byte_db[:, first - start : mine.stop - start] = byte_bd.T
            small["sums"][mine] = byte_bd.sum(axis=1, dtype=np.int32)
            small["columns"][block] += byte_bd.sum(axis=0, dtype=np.int32)
            small["words"][mine] = _add_words(some_bd)
            put("vectors", first * size * 4, some_bd)
        put("bytes", start * size, byte_db)
    for name, array in small.items():
        put(name, 0, array)
    head = {"key": key, "num_images": number, "num_features": size, "digest": _digest(small.values())}
    file.seek(0)
    file.write(json.dumps(head).encode() + b"\n")
    file.truncate(layout.num_bytes)


def _compute_mean(vectors_nd: FloatArray) -> FloatArray:
    total_d = np.zeros(vectors_nd.shape[1])
    for start in range(0, len(vectors_nd), STEP_ROWS):
        some_bd = vectors_nd[start : start + STEP_ROWS]
        check_vectors(np.zeros((1, len(total_d)), np.float32), some_bd)
        total_d += scale(some_bd)[0].sum(axis=0, dtype=np.float64)
    return np.asarray(total_d / len(vectors_nd), np.float32)


def _round(rest_bd: FloatArray, mean_d: FloatArray) -> tuple[NDArray[np.int8], FloatArray]:
    """Return the bytes of x - m, and the numbers that go with them (see `_Layout`)."""
    largest_b = np.abs(rest_bd).max(axis=1)
    step_b = np.where(largest_b > 0, largest_b / MOST_BYTE, 1).astype(np.float32)
    rounded_bd = np.rint(rest_bd / step_b[:, None])
    byte_bd = rounded_bd.astype(np.int8)
    rounded_bd *= step_b[:, None]
    lost_b = np.linalg.norm(rest_bd - rounded_bd, axis=1)
    return byte_bd, np.stack([step_b, lost_b, np.linalg.norm(rounded_bd, axis=1), rest_bd @ mean_d])


class KeptVectors:
    """The vectors of a file that is kept, memory-mapped. `path` is the file."""

    def __init__(self, path: Path, key: str) -> None:
        """Open it. Raises OSError, and DamagedVectors where it is of another key, or damaged."""
        self.path = path
        raw = np.memmap(path, np.uint8, "r")
        try:
            head = json.loads(bytes(raw[:PAGE]).partition(b"\n")[0])
            layout = _Layout(head["num_images"], head["num_features"])
            is_mine, is_whole = head["key"] == key, layout.num_bytes == len(raw)
            digest = head["digest"]
        except (ValueError, KeyError, TypeError) as exc:
            raise self._make_error() from exc
        if not (is_mine and is_whole):
            raise self._make_error()
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, (place, shape, kind) in layout.arrays.items():
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            self._arrays[name] = raw[place : place + size].view(kind).reshape(shape)
        if _digest(self._arrays[name] for name in _SMALL) != digest:
            raise self._make_error()
        self.vectors_nd: FloatArray = self._arrays["vectors"]

    def _make_error(self) -> DamagedVectors:
        return DamagedVectors(str(self.path), "is damaged, or of other images", "the vectors that were kept")

    def read(self, rows: IntArray) -> FloatArray:
        """Return the vectors of some rows. Raises DamagedVectors."""
        vectors_nd = np.asarray(self.vectors_nd[rows])
        if (_add_words(vectors_nd) != self._arrays["words"][rows]).any():
            raise self._make_error()
        return vectors_nd

    def find(self, query_md: FloatArray, k: int) -> tuple[DoubleArray, IntArray]:
        """Return the same as `find_neighbours` of all vectors, by cosine. Raises DatasetError, and DamagedVectors."""
        check_vectors(query_md, self.vectors_nd[:1])
        unit_md, empty_m = scale(query_md)
        if 0 < len(query_md) <= MOST_QUERIES and 0 < k <= len(self.vectors_nd) and not empty_m.any():
            rows = self._choose(unit_md, k)
            vectors = self.read(rows) if len(rows) <= MOST_NEAR else None
            near = None if vectors is None else choose_near(query_md, vectors, k)
            if vectors is not None and near is not None:
                distance_mk, place_mk = find_neighbours(query_md, vectors[near], k)
                return distance_mk, rows[near][place_mk]
        distance_mk, row_mk = find_neighbours(query_md, self.vectors_nd, k)
        self.read(np.unique(row_mk))
        return distance_mk, row_mk

    def _choose(self, unit_md: FloatArray, k: int) -> IntArray:
        """Return, in order, all rows that may be among the k nearest of a few unit vectors, by the bound."""
        mean_d, (step_n, lost_n, kept_n, base_n) = self._arrays["mean"], self._arrays["numbers"]
        rest_md = unit_md - mean_d
        largest_m1 = np.abs(rest_md).max(axis=1, keepdims=True)
        unit_m1 = np.where(largest_m1 > 0, largest_m1 / MOST_ASKED, 1).astype(np.float32)
        asked_md = np.rint(rest_md / unit_m1) + (MOST_ASKED + 1)  # 1 to 127
        left_m1 = np.linalg.norm(rest_md - (asked_md - (MOST_ASKED + 1)) * unit_m1, axis=1, keepdims=True)
        length_m1 = np.linalg.norm(rest_md, axis=1, keepdims=True)
        same_m1 = (unit_md @ mean_d)[:, None]
        low_mk = np.full((len(unit_md), k), -np.inf, np.float32)  # the k highest of what cosines are at least
        found: list[tuple[IntArray, FloatArray]] = []
        for start, product_mb in self._multiply(asked_md):
            mine = slice(start, start + product_mb.shape[1])
            sum_mb = product_mb - (MOST_ASKED + 1) * self._arrays["sums"][mine]
            cosine_mb = same_m1 + base_n[mine] + (unit_m1 * step_n[mine]) * sum_mb
            wrong_mb = length_m1 * lost_n[mine] + left_m1 * kept_n[mine] + np.float32(ROUNDING)
            high_mb = cosine_mb + wrong_mb
            some = np.flatnonzero((high_mb >= low_mk.min(axis=1, keepdims=True)).any(axis=0))
            if len(some):
                low_mk = np.hstack([low_mk, cosine_mb[:, some] - wrong_mb[:, some]])
                low_mk = np.partition(low_mk, -k, axis=1)[:, -k:]
                found.append((start + some, high_mb[:, some]))
        least_m1 = low_mk.min(axis=1, keepdims=True)
        return np.concatenate([rows[(high >= least_m1).any(axis=0)] for rows, high in found])

    def _multiply(self, asked_md: FloatArray) -> Iterable[tuple[int, NDArray[np.int32]]]:
        """Yield the first row of each block, and the products of questions with its bytes, (m, b)."""
        (number, size), run = self.vectors_nd.shape, _make_product().run
        byte_md, exact_md = asked_md.astype(np.uint8), asked_md.astype(np.int64)
        for block, start in enumerate(range(0, number, BLOCK_ROWS)):
            stop = min(number, start + BLOCK_ROWS)
            byte_db = self._arrays["bytes"][start * size : stop * size].reshape(size, stop - start)
            product_mb = run(None, {"asked": byte_md, "kept": byte_db})[0]
            if (product_mb.sum(axis=1, dtype=np.int64) != exact_md @ self._arrays["columns"][block]).any():
                raise self._make_error()
            yield start, product_mb


def _add_words(vectors_nd: FloatArray) -> NDArray[np.uint32]:
    """Return the sum of the 32-bit words of each vector, from 0 again behind the largest."""
    return np.asarray(vectors_nd.view("<u4").sum(axis=1, dtype=np.uint32))


def _digest(arrays: Iterable[NDArray[Any]]) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(array.data)
    return total.hexdigest()


@cache
def _make_product() -> Any:
    """Return ONNX Runtime with one node: a product of bytes, without a sign and with one, in 32 bits."""
    from onnx import TensorProto, helper

    node = helper.make_node("MatMulInteger", ["asked", "kept"], ["product"])
    asked = helper.make_tensor_value_info("asked", TensorProto.UINT8, ["m", "d"])
    kept = helper.make_tensor_value_info("kept", TensorProto.INT8, ["d", "b"])
    product = helper.make_tensor_value_info("product", TensorProto.INT32, ["m", "b"])
    graph = helper.make_graph([node], "product", [asked, kept], [product])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return open_session(model.SerializeToString(), "a product of bytes", 0)
