"""What a bundle's files may hold: a graph that needs nothing else, in whatever part of it; a card that we can read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

from fakes import make_bundle, make_image
from visionloop.bundle import DIGESTS, Bundle, check_onnx, load_bundle, seal_bundle
from visionloop.errors import BundleError
from visionloop.predictor import Predictor
from visionloop.records import CARD_SCHEMA


def make_outside(name: str = "outside") -> TensorProto:
    """A tensor whose values are in a file of the machine."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def make_branch(*nodes: onnx.NodeProto, weights: tuple[TensorProto, ...] = ()) -> GraphProto:
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    last = nodes or (helper.make_node("Identity", ["w"], ["out"]),)
    return helper.make_graph(list(last), "branch", [], [result], list(weights))


def make_if(branch: GraphProto) -> onnx.NodeProto:
    fine = make_branch(helper.make_node("Constant", [], ["out"], value=numpy_helper.from_array(np.zeros(1, "f4"))))
    return helper.make_node("If", ["yes"], ["out"], then_branch=fine, else_branch=branch)


def make_model(*nodes: onnx.NodeProto, weights: tuple[TensorProto, ...] = ()) -> ModelProto:
    yes = numpy_helper.from_array(np.array(True), "yes")
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    graph = helper.make_graph(list(nodes), "outer", [], [result], [yes, *weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def in_if() -> ModelProto:
    return make_model(make_if(make_branch(weights=(make_outside("w"),))))


def in_if_of_an_if() -> ModelProto:
    return make_model(make_if(make_branch(make_if(make_branch(weights=(make_outside("w"),))))))


def in_constant_of_a_branch() -> ModelProto:
    return make_model(make_if(make_branch(helper.make_node("Constant", [], ["out"], value=make_outside()))))


def in_body(operator: str) -> Callable[[], ModelProto]:
    return lambda: make_model(
        helper.make_node(operator, ["a"], ["out"], body=make_branch(weights=(make_outside("w"),)))
    )


def in_list_of_graphs() -> ModelProto:
    node = helper.make_node("Identity", ["yes"], ["out"])
    inner = AttributeProto(name="many", type=AttributeProto.GRAPHS, graphs=[make_branch(weights=(make_outside("w"),))])
    node.attribute.append(inner)
    return make_model(node)


def in_list_of_tensors() -> ModelProto:
    node = helper.make_node("Identity", ["yes"], ["out"])
    node.attribute.append(AttributeProto(name="many", type=AttributeProto.TENSORS, tensors=[make_outside()]))
    return make_model(node)


def make_sparse() -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.zeros(1, "i8"), "indices")
    return onnx.SparseTensorProto(values=make_outside("s"), indices=indices, dims=[4])


def in_sparse_weights() -> ModelProto:
    model = make_model(helper.make_node("Identity", ["s"], ["out"]))
    model.graph.sparse_initializer.append(make_sparse())
    return model


def in_sparse_weights_of_a_branch() -> ModelProto:
    branch = make_branch()
    branch.sparse_initializer.append(make_sparse())
    return make_model(make_if(branch))


def in_sparse_constant() -> ModelProto:
    return make_model(helper.make_node("Constant", [], ["out"], sparse_value=make_sparse()))


def in_list_of_sparse_tensors() -> ModelProto:
    node = helper.make_node("Identity", ["yes"], ["out"])
    many = AttributeProto(name="many", type=AttributeProto.SPARSE_TENSORS, sparse_tensors=[make_sparse()])
    node.attribute.append(many)
    return make_model(node)


def make_function(*nodes: onnx.NodeProto, domain: str = "") -> ModelProto:
    model = make_model(helper.make_node("Own", [], ["out"], domain=domain))
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function(domain, "Own", [], ["out"], list(nodes), opsets))
    return model


def in_function() -> ModelProto:
    return make_function(helper.make_node("Constant", [], ["out"], value=make_outside()))


def in_branch_of_a_function() -> ModelProto:
    return make_function(make_if(make_branch(weights=(make_outside("w"),))))


def in_default_of_a_function() -> ModelProto:
    model = make_function(helper.make_node("Constant", [], ["out"], value_float=1.0))
    model.functions[0].attribute_proto.append(helper.make_attribute("of", make_outside()))
    return model


def in_training_info() -> ModelProto:
    model = make_model(helper.make_node("Identity", ["yes"], ["out"]))
    model.training_info.add().initialization.CopyFrom(make_branch(weights=(make_outside("w"),)))
    return model


def named_but_not_marked() -> ModelProto:
    tensor = make_outside("w")
    tensor.ClearField("data_location")
    return make_model(helper.make_node("Identity", ["w"], ["out"]), weights=(tensor,))


HIDDEN = [
    *(in_if, in_if_of_an_if, in_constant_of_a_branch, in_body("Loop"), in_body("Scan"), in_list_of_graphs),
    *(in_list_of_tensors, in_sparse_weights, in_sparse_weights_of_a_branch, in_sparse_constant),
    *(in_list_of_sparse_tensors, in_function, in_branch_of_a_function, in_default_of_a_function, in_training_info),
    named_but_not_marked,
]


@pytest.mark.parametrize("make", HIDDEN, ids=lambda make: make.__name__)
def test_weights_in_another_file_are_found_wherever_they_hide(make: Callable[[], ModelProto]) -> None:
    with pytest.raises(BundleError, match=r"^m: keeps weights in other files; expected one self-contained file"):
        check_onnx(make().SerializeToString(), "m")


def custom_in_a_branch() -> ModelProto:
    return make_model(make_if(make_branch(helper.make_node("Evil", [], ["out"], domain="evil"))))


def custom_in_a_function() -> ModelProto:
    return make_function(helper.make_node("Evil", [], ["out"], domain="evil"))


def custom_of_a_function() -> ModelProto:
    return make_function(helper.make_node("Constant", [], ["out"], value_float=1.0), domain="evil")


def custom_opset_of_a_function() -> ModelProto:
    model = make_function(helper.make_node("Constant", [], ["out"], value_float=1.0))
    model.functions[0].opset_import.append(helper.make_opsetid("evil", 1))
    return model


CUSTOM = [custom_in_a_branch, custom_in_a_function, custom_of_a_function, custom_opset_of_a_function]


@pytest.mark.parametrize("make", CUSTOM, ids=lambda make: make.__name__)
def test_operators_of_a_custom_domain_are_found_wherever_they_hide(make: Callable[[], ModelProto]) -> None:
    with pytest.raises(BundleError, match=r"^m: uses the operator domains evil; expected standard ONNX operators"):
        check_onnx(make().SerializeToString(), "m")


def test_a_graph_with_everything_inside_is_taken() -> None:
    inside = numpy_helper.from_array(np.ones(1, "f4"), "w")
    model = make_model(make_if(make_branch(make_if(make_branch(weights=(inside,))))))
    assert check_onnx(model.SerializeToString(), "m") == model


def wrap(field: int, data: bytes) -> bytes:
    """Return data as a field of a protobuf message, written by hand: the library refuses to nest so deep."""
    length, number = b"", len(data)
    while number > 127:
        length, number = length + bytes([number & 127 | 128]), number >> 7
    return bytes([field << 3 | 2]) + length + bytes([number]) + data


def test_a_graph_nested_without_end_is_refused() -> None:
    data = b""
    for _ in range(5000):
        data = wrap(1, wrap(5, wrap(6, data)))  # a graph's node's attribute's graph
    with pytest.raises(BundleError, match="is not ONNX"):
        check_onnx(wrap(7, data), "m")


def set_card(folder: Path, **keys: object) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **keys}))
    seal_bundle(folder)


def test_a_card_of_a_later_visionloop_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    set_card(tmp_path / "b", schema=CARD_SCHEMA + 1, calibration={"kind": "new"})
    for load in (load_bundle, Predictor.load):
        with pytest.raises(
            BundleError, match=rf"card\.json is of schema {CARD_SCHEMA + 1}; expected at most"
        ) as caught:
            load(tmp_path / "b")
        assert "It was made by a later visionloop: install that, or train again with this one." in str(caught.value)


@pytest.mark.parametrize("schema", [0, -1, True, "1", None, 1.0, [1]])
def test_a_schema_that_is_none_is_a_damaged_card(tmp_path: Path, schema: object) -> None:
    make_bundle(tmp_path / "b")
    set_card(tmp_path / "b", schema=schema)
    with pytest.raises(BundleError, match=r"card\.json is damaged"):
        load_bundle(tmp_path / "b")


def test_a_card_of_an_earlier_visionloop_opens(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    card = json.loads((tmp_path / "b" / "card.json").read_text())
    del card["schema"]
    (tmp_path / "b" / "card.json").write_text(json.dumps(card))
    seal_bundle(tmp_path / "b")
    assert load_bundle(tmp_path / "b").card.name == "fake"
    set_card(tmp_path / "b", schema=1)
    assert load_bundle(tmp_path / "b").card.schema == 1


def test_golden_images_are_there_before_a_bundle_is_sealed(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    sealed = load_bundle(tmp_path)
    (tmp_path / DIGESTS).unlink()
    unsealed = Bundle(tmp_path, "unsealed", sealed.card, {})
    assert unsealed.golden_images() == sealed.golden_images() != []


@pytest.mark.parametrize(
    "name", ["../../secret.png", "/etc/hostname", "gone.png", "../golden/../card.json", "x" * 300, "..", 1, ["00.png"]]
)
def test_golden_images_are_files_of_the_bundle_alone(tmp_path: Path, name: object) -> None:
    (tmp_path / "secret.png").write_bytes(make_image(1))
    make_bundle(tmp_path / "bundle")
    path = tmp_path / "bundle" / "golden" / "answers.json"
    answers = json.loads(path.read_text())
    answers["images"][0] = name
    path.write_text(json.dumps(answers))
    seal_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"golden/answers\.json: names .*; expected files that lie beside it"):
        Predictor.load(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"golden/answers\.json: names"):
        load_bundle(tmp_path / "bundle").golden_names()
