"""The output of the stage `embed`: the embeddings of prepared data, and how training reads them. No torch.

    features/encoder.json          {"needed": false}, or the encoder's facts and the number of images
    features/embeddings.parquet    sha256, vector (fixed-size list of float32): a row for each row of the prepared index

Dimensions: n images, d features.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from visionloop.data.rows import Digests
from visionloop.data.shards import Prepared
from visionloop.errors import DatasetError
from visionloop.records import Record, compute_digest

# Increased when the same weights, preprocessing and runtime give other vectors than before.
VERSION = 2  # 2: each network has its own normalisation
FACTS, EMBEDDINGS = "encoder.json", "embeddings.parquet"
VECTORS = "vectors"  # in .visionloop/features: see `kept`
ENCODER_KEY = b"visionloop.encoder"
GROUP_ROWS = 4096
TODO = "Run `visionloop embed`."
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class EncoderFacts(Record):
    """What defines an encoder: a backbone and its weights, the preprocessing, the runtime and its precision.

    `weights_digest` is over the tensors. `source` is the digest of the bundle that the encoder is from, else "params".
    `crop` is set if the training side is stored larger: then the middle of each training image is embedded.
    """

    source: str
    backbone: str
    weights: str
    weights_digest: str
    image_size: tuple[int, int]
    resize: str
    runtime: str
    precision: str
    crop: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Build the facts from a decoded JSON object. Raises KeyError, TypeError when it is none."""
        return super().from_json({**value, "image_size": (int(value["image_size"][0]), int(value["image_size"][1]))})

    @property
    def digest(self) -> str:
        """The name of the encoder: embeddings of equal digests can be compared."""
        return compute_digest({name: value for name, value in self.to_json().items() if name != "weights"})

    def describe(self) -> str:
        """Return the encoder in words: `resnet18 at 224 x 224, onnxruntime fp32`."""
        height, width = self.image_size
        name = self.backbone if self.source == "params" else f"{self.backbone} of bundle {self.source[:12]}"
        return f"{name} at {height} x {width}, {self.runtime} {self.precision}"


def describe_crop(prepared: Prepared) -> dict[str, Any]:
    """Return `EncoderFacts.crop`: the size at which the training side is stored, if it is stored larger; else nothing.

    Which images are on the training side depends on the dataset, so its name belongs to it.
    """
    if prepared.train_shards is None:
        return {}
    return {"dataset": prepared.pin.name, "train_size": list(prepared.train_shards.size_hw)}


def load_features(folder: Path, prepared: Prepared) -> tuple[FloatArray, EncoderFacts]:
    """Return the embeddings of prepared data, (n, d), in the order of its rows, and the facts of their encoder.

    Raises:
        DatasetError: they are missing, empty (the way did not need them), damaged, or of other data or sizes.
    """
    where, facts = f"embeddings {folder}", load_facts(folder)
    try:
        table = pq.read_table(folder / EMBEDDINGS, memory_map=True)
        sha256_n, embedding_nd = Digests(table["sha256"].chunks), to_matrix(table["vector"])
        encoder = (table.schema.metadata or {}).get(ENCODER_KEY, b"").decode()
    except FileNotFoundError as exc:
        raise DatasetError(where, "are missing", "those of the prepared data", TODO) from exc
    except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowInvalid) as exc:
        raise DatasetError(where, "are damaged", "those of the prepared data", TODO) from exc
    if encoder != facts.digest:
        raise DatasetError(where, "belong to another encoder than encoder.json says", "one encoder", TODO)
    if sha256_n != prepared.sha256_n:
        found = f"are those of other images ({len(sha256_n):,} of them)"
        raise DatasetError(where, found, f"those of the {len(prepared.sha256_n):,} prepared images", TODO)
    if (facts.image_size, facts.resize) != (prepared.size_hw, prepared.resize):
        found = f"were made from images of another size or resize rule ({facts.describe()})"
        raise DatasetError(where, found, f"{prepared.size_hw[0]} x {prepared.size_hw[1]}, {prepared.resize}", TODO)
    return embedding_nd, facts


def load_facts(folder: Path) -> EncoderFacts:
    """Return the encoder of the embeddings in a folder. Raises DatasetError: they are missing, empty or damaged."""
    where = f"embeddings {folder}"
    try:
        value = json.loads((folder / FACTS).read_bytes())
        if value["needed"]:
            return EncoderFacts.from_json(value["encoder"])
    except FileNotFoundError as exc:
        raise DatasetError(where, "are missing", "those of the prepared data", TODO) from exc
    except (OSError, ValueError, KeyError, TypeError, IndexError) as exc:
        raise DatasetError(where, "are damaged", "those of the prepared data", TODO) from exc
    raise DatasetError(where, "are empty: `train.way` did not need any", "those of the prepared data", TODO)


def write_features(folder: Path, sha256_n: Sequence[str], embedding_nd: FloatArray, facts: EncoderFacts) -> None:
    """Write the embeddings of prepared data into a folder. Equal input gives equal bytes."""
    schema = make_schema(embedding_nd.shape[1], facts.digest)
    with pq.ParquetWriter(folder / EMBEDDINGS, schema, compression="NONE", use_dictionary=False) as writer:
        for start in range(0, len(sha256_n), GROUP_ROWS):
            rows = slice(start, start + GROUP_ROWS)
            writer.write_table(make_table(sha256_n[rows], embedding_nd[rows], schema))
    value = {"needed": True, "encoder": facts.to_json(), "num_images": len(sha256_n)}
    (folder / FACTS).write_text(json.dumps({**value, "num_features": embedding_nd.shape[1]}, indent=2) + "\n")


def write_empty(folder: Path) -> None:
    """Write the output for a `train.way` that needs no embeddings."""
    (folder / FACTS).write_text(json.dumps({"needed": False}, indent=2) + "\n")


def make_schema(num_features: int, encoder: str) -> pa.Schema:
    """Return the columns of embeddings, with the encoder's digest in the metadata."""
    columns = [("sha256", pa.string()), ("vector", pa.list_(pa.float32(), num_features))]
    return pa.schema(columns, metadata={ENCODER_KEY: encoder.encode()})


def make_table(sha256_n: Sequence[str], embedding_nd: FloatArray, schema: pa.Schema) -> pa.Table:
    """Return rows of embeddings as a table."""
    flat = pa.array(np.ascontiguousarray(embedding_nd, np.float32).reshape(-1))
    vector = pa.FixedSizeListArray.from_arrays(flat, embedding_nd.shape[1])
    return pa.Table.from_arrays([pa.array(sha256_n, pa.string()), vector], schema=schema)


def to_matrix(column: pa.ChunkedArray) -> FloatArray:
    """Return a column of vectors as (n, d). Raises ValueError if it is no column of float32 vectors, or has nulls."""
    if not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float32() or column.null_count:
        raise ValueError("no column of float32 vectors")
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)
