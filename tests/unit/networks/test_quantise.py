"""A graph in int8: which layers, the same bytes each time, and what cannot be made int8."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from visionloop.bundle import check_onnx
from visionloop.errors import TrainingError
from visionloop.networks.export import quantise
from visionloop.predictor import Embedder

SIZE = 16


def write_model(path: Path, *, convs: int = 3, kind: int = TensorProto.FLOAT) -> Path:
    """Write a classifier of a few convolutions; its nodes have no names."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=kind),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["x0"], perm=[0, 3, 1, 2]),
    ]
    weights = {"scale": np.float32(1 / 255), "head": rng.normal(size=(8, 2)), "bias": rng.normal(size=2)}
    for i in range(convs):
        weights[f"w{i}"] = rng.normal(size=(8, 3 if i == 0 else 8, 3, 3)) / 5
        nodes += [
            helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"]),
        ]
    nodes += [
        helper.make_node("GlobalAveragePool", [f"x{convs}"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"], axis=1),
        helper.make_node("Gemm", ["embedding", "head", "bias"], ["logits"]),
    ]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info("logits", kind, ["n", 2]),
            helper.make_tensor_value_info("embedding", kind, ["n", 8]),
        ],
        [numpy_helper.from_array(np.asarray(value, dtype), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def make_batches(number: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (8, SIZE, SIZE, 3), dtype=np.uint8) for _ in range(number)]


def test_all_but_the_first_layer_and_the_head_is_int8(tmp_path: Path) -> None:
    quantise(write_model(tmp_path / "m.onnx"), tmp_path / "i.onnx", make_batches())
    model = check_onnx((tmp_path / "i.onnx").read_bytes(), "int8")
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    layers = [node for node in model.graph.node if node.op_type in {"Conv", "Gemm"}]
    assert [made_by.get(node.input[0]) == "DequantizeLinear" for node in layers] == [False, True, True, False]
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {kinds[name] for name in kinds if name.startswith(("w1_q", "w2_q"))} == {TensorProto.INT8}
    assert kinds["w0"] == kinds["head"] == TensorProto.FLOAT
    scale = next(t for t in model.graph.initializer if t.name == "w1_scale")
    assert list(scale.dims) == [8], "one scale for each channel"
    assert (model.doc_string, list(model.metadata_props), model.producer_name) == ("", [], "")
    assert {(each.domain, each.version) for each in model.opset_import} == {("", 20)}


def test_it_gives_nearly_the_same_vectors_and_the_same_bytes_again(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.onnx")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        quantise(source, tmp_path / name / "i.onnx", iter(make_batches()))
    assert (tmp_path / "a" / "i.onnx").read_bytes() == (tmp_path / "b" / "i.onnx").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["i.onnx"], "no folder is left behind"
    images = np.concatenate(make_batches(2))
    ours, theirs = (Embedder(path, threads=1).embed(images) for path in (tmp_path / "a" / "i.onnx", source))
    assert 0 < np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


def test_what_cannot_be_made_int8_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, batches: list[np.ndarray], message: str) -> None:
        with pytest.raises(TrainingError, match=message):
            quantise(path, tmp_path / "i.onnx", batches)
        assert not (tmp_path / "i.onnx").exists()

    fail(write_model(tmp_path / "one.onnx", convs=1), make_batches(), "there are 1 layers before the head")
    fail(write_model(tmp_path / "none.onnx"), [], "the graph cannot be made int8")
    fail(write_model(tmp_path / "size.onnx"), [np.zeros((1, 8, 8, 3), np.uint8)], "the graph cannot be made int8")
    monkeypatch.setattr("visionloop.networks.export.MAX_BYTES", 10)
    fail(tmp_path / "size.onnx", make_batches(), "the graph has .* GB")
