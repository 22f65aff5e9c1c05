"""Small ONNX encoders as others export them: a convolution, a mean and a dense layer, and workspaces that use them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from trainings import Place, make_place
from visionloop.errors import TrainingError
from visionloop.features.embed import embed
from visionloop.params import load_params
from visionloop.settings import load_settings
from visionloop.store import open_store

WIDTH, FEATURES = 8, 16
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_normalize": True, "do_rescale": True, "resample": 3}
CLIP |= {"rescale_factor": 1 / 255, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
CLIP |= {"do_center_crop": True, "do_resize": True}


def make_weights(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the filters of the convolution and the matrix of the dense layer."""
    random = np.random.default_rng(seed)
    filters = random.normal(0, 0.2, (WIDTH, 3, 5, 5)).astype(np.float32)
    return filters, random.normal(0, 0.5, (WIDTH, FEATURES)).astype(np.float32)


def make_encoder(
    *,
    layout: str = "NCHW",
    kind: int = TensorProto.FLOAT,
    opset: int = 18,
    shape: Sequence[int | str | None] | None = None,
    output_kind: int | None = None,
    seed: int = 0,
    reshape_to: Sequence[int] = (),
) -> onnx.ModelProto:
    """Return an encoder. `shape` of its input: any batch of 32 x 32 by default. `reshape_to`: of the vectors, fixed."""
    weight_kind = TensorProto.FLOAT if kind == TensorProto.UINT8 else kind
    dtype = helper.tensor_dtype_to_np_dtype(weight_kind)
    weights = [numpy_helper.from_array(w.astype(dtype), f"w{n}") for n, w in enumerate(make_weights(seed))]
    shape = shape or (["batch", 3, 32, 32] if layout == "NCHW" else ["batch", 32, 32, 3])
    nodes, last = [], "images"  # a name that our own graphs use too

    def add(op: str, *others: str, **attributes: Any) -> None:
        nonlocal last
        nodes.append(helper.make_node(op, [last, *others], [f"t{len(nodes)}"], **attributes))
        last = f"t{len(nodes) - 1}"

    if kind == TensorProto.UINT8:
        add("Cast", to=TensorProto.FLOAT)
    if layout == "NHWC":
        add("Transpose", perm=[0, 3, 1, 2])
    add("Conv", "w0", strides=[4, 4])
    add("Relu")
    add("GlobalAveragePool")
    nodes.append(helper.make_node("Identity", [last], ["maps"]))
    add("Flatten", axis=1)
    add("MatMul", "w1")
    if reshape_to:
        weights.append(numpy_helper.from_array(np.asarray(reshape_to, np.int64), "shape"))
        add("Reshape", "shape")
    nodes.append(helper.make_node("Identity", [last], ["embedding"]))
    end = helper.make_tensor_value_info("embedding", output_kind or weight_kind, None)
    start = helper.make_tensor_value_info("images", kind, list(shape))
    graph = helper.make_graph(nodes, "g", [start], [end], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def add_output(model: onnx.ModelProto, name: str, shape: Sequence[int | str] | None, op: str, *inputs: str) -> None:
    """Give an encoder one more output, by one more operator."""
    model.graph.node.append(helper.make_node(op, list(inputs), [name]))
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def write(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def compute_embeddings(
    images_nhwc: NDArray[np.uint8],
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    seed: int = 0,
) -> NDArray[np.float32]:
    """Return what the encoder gives for images, by torch, from pixels that are normalised here."""
    pixels = (torch.from_numpy(images_nhwc).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    filters, dense = (torch.from_numpy(weights) for weights in make_weights(seed))
    maps = functional.relu(functional.conv2d(pixels.permute(0, 3, 1, 2).float(), filters, stride=4))
    return (maps.mean(dim=(2, 3)) @ dense).numpy()


def make_home(home: Path) -> Path:
    """Make a workspace of 72 prepared shapes, whose `train.backbone` is a file that each test writes."""
    make_place(home, backbone="encoder.onnx", way="frozen", preprocessing="imagenet", max_epochs=3)
    return home


def copy_place(made: Path, home: Path) -> Place:
    """Copy a workspace, and open the copy as a place to train in."""
    shutil.copytree(made, home)
    settings = load_settings({}, home)
    return Place(settings, load_params(settings.params_path), open_store(settings.store_url))


def put(place: Place, model: onnx.ModelProto) -> Path:
    """Write a model where `train.backbone` of the place looks for it."""
    return write(model, place.settings.home / "encoder.onnx")


def refuse(place: Place, kind: type[Exception] = TrainingError, *, kept: int = 0) -> str:
    """Return what is said, in one line; so many graphs that were kept before are there still, and no other."""
    with pytest.raises(kind) as caught:
        embed(place)
    assert "\n" not in str(caught.value)
    assert len(list((place.settings.hidden_dir / "encoders").glob("*.onnx"))) == kept
    return str(caught.value)
