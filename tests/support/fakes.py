"""Small real objects for tests: images, and bundles whose network is one linear layer. No torch."""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionloop.bundle import load_bundle, seal_bundle
from visionloop.predictor import Predictor
from visionloop.records import Card, canonical_json

COMMANDS = (  # of the command line, as agreed
    *("start", "new", "ingest", "datasets", "forget", "prepare", "embed", "train", "evaluate", "gate"),
    *("register", "promote", "rollback", "history", "serve", "predict", "doctor", "store", "runs", "tune"),
    *("lr-find", "similar", "map", "suspects", "explain", "export", "compare", "approve", "lineage", "keys"),
    *("predictions", "monitor", "triggers", "review", "up", "status", "down", "ui", "retrain", "schedule", "shadow"),
    "metrics",
)
NUM_GOLDEN = 4
GRID = 4


def make_image(seed: int, *, size_hw: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    """Encode a smooth random picture: the same seed gives the same bytes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (GRID, GRID, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size_hw[1], size_hw[0]), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_photos(folder: Path, number: int = 10, first: int = 0, classes: Sequence[str] = ("cat", "dog")) -> Path:
    """Write `number` PNG files a class, from number `first` on, into a folder for each class."""
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + number):
            (folder / name / f"{i}.png").write_bytes(make_image(1000 * k + i))
    return folder


def run_here(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Run a command in this process; return its exit code."""
    from visionloop.cli import main

    monkeypatch.setattr(sys, "argv", ["visionloop", *argv])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def make_bundle(
    folder: Path,
    *,
    classes: Sequence[str] = ("a", "b", "c"),
    size_hw: tuple[int, int] = (32, 32),
    seed: int = 0,
    task: str | None = None,
    engines: Sequence[str] = (),
) -> str:
    """Write a whole, sealed bundle into `folder` and return its digest.

    Its network pools the pixels on a coarse grid (the embedding) and puts one linear layer on top (the logits).
    Without a task two classes make a binary model with threshold 0.5, more of them a multiclass one. The card approves
    of `engines`, and with any there is a second graph, which is not in int8 at all.
    """
    (folder / "golden").mkdir(parents=True)
    embedding_size = _write_model(folder / "model.onnx", len(classes), size_hw, seed)
    card = make_card(tuple(classes), size_hw, seed, task)
    if engines:
        card = replace(card, runtimes=tuple(engines))
        shutil.copyfile(folder / "model.onnx", folder / "model.int8.onnx")
    (folder / "card.json").write_bytes(canonical_json(card.to_json()))
    reference = np.random.default_rng(seed).random((8, embedding_size), dtype=np.float32)
    hashes = np.array([f"{seed:032x}{i:032x}" for i in range(len(reference))], "S64")
    label_n = np.arange(len(reference)) % len(classes)
    np.savez(folder / "reference.npz", embedding_nd=reference, label_n=label_n, sha256_n=hashes)
    names = [f"{i}.png" for i in range(NUM_GOLDEN)]
    for i, name in enumerate(names):
        (folder / "golden" / name).write_bytes(make_image(seed * NUM_GOLDEN + i))
    _write_answers(folder, {"images": names, "logits": [[0.0] * len(classes)] * len(names)})
    seal_bundle(folder)
    predictor = Predictor(load_bundle(folder), threads=1)
    arrays = [predictor.decode(data, "golden") for data in predictor.bundle.golden_images()]
    _write_answers(folder, {"images": names, "logits": predictor.run(np.stack(arrays)).logits_nk.tolist()})
    return seal_bundle(folder)


def _write_answers(folder: Path, answers: dict[str, object]) -> None:
    (folder / "golden" / "answers.json").write_text(json.dumps(answers, sort_keys=True))


def make_card(
    classes: tuple[str, ...] = ("a", "b", "c"),
    size_hw: tuple[int, int] = (32, 32),
    seed: int = 0,
    task: str | None = None,
) -> Card:
    """Return a card with everything on it."""
    task = task or ("binary" if len(classes) == 2 else "multiclass")
    return Card(
        name="fake",
        task=task,
        classes=classes,
        image_size=size_hw,
        resize="squash",
        temperature=1.0,
        threshold=0.5 if task == "binary" else None,
        thresholds=dict.fromkeys(classes, 0.5) if task == "multilabel" else None,
        runtimes=("onnxruntime",),
        dataset={"name": "fake", "version": 1, "digest": "0" * 64},
        params={"seed": seed},
        network={"backbone": "linear"},
        parity=0.0,
    )


def _write_model(path: Path, num_classes: int, size_hw: tuple[int, int], seed: int) -> int:
    """Write the network and return the size of its embedding."""
    from onnx import TensorProto, checker, helper, numpy_helper, save

    kernel = [max(1, side // GRID) for side in size_hw]
    cells = [(side - step) // step + 1 for side, step in zip(size_hw, kernel, strict=True)]
    embedding_size = 3 * cells[0] * cells[1]
    weights = np.random.default_rng(seed).normal(0, 0.7, (embedding_size, num_classes)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels", "scale"], ["unit"]),
        helper.make_node("Sub", ["unit", "half"], ["centred"]),
        helper.make_node("Transpose", ["centred"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["nchw"], ["pooled"], kernel_shape=kernel, strides=kernel),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *size_hw, 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", num_classes]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", embedding_size]),
        ],
        [
            numpy_helper.from_array(np.float32(255.0), "scale"),
            numpy_helper.from_array(np.float32(0.5), "half"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, path)
    return embedding_size
