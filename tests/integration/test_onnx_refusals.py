"""ONNX files that cannot be an encoder of images, and keys that do not fit one: refused in one line each."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from encoders import FEATURES, add_output, copy_place, make_encoder, make_home, put, refuse
from trainings import Place
from visionloop.errors import ParamsError, TrainingError
from visionloop.features.embed import embed
from visionloop.networks import onnx_graph
from visionloop.params import Train, make_params

KNN = {"neighbours": {"k": 3}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("encoders") / "ws")


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    return copy_place(made, tmp_path / "ws")


def make_text_tower() -> onnx.ModelProto:
    nodes = [helper.make_node("Cast", ["input_ids"], ["embedding"], to=TensorProto.FLOAT)]
    start = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 77])
    end = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 77])
    graph = helper.make_graph(nodes, "text", [start], [end])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def make_external() -> onnx.ModelProto:
    model = make_encoder()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="encoder.onnx.data")
    return model


def make_hidden_external() -> onnx.ModelProto:
    """Weights in another file, asked for by a node."""
    model = make_encoder()
    value = make_external().graph.initializer[0]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["secret"], value=value))
    return model


def make_custom() -> onnx.ModelProto:
    model = make_encoder()
    model.graph.node[0].domain = "com.vendor"
    model.opset_import.append(helper.make_opsetid("com.vendor", 1))
    return model


def make_tokens() -> onnx.ModelProto:
    model = make_encoder()
    del model.graph.output[:]
    add_output(model, "last_hidden_state", ["batch", 1, 1, 8], "Transpose", "maps")
    return model


CASES: dict[str, tuple[Any, str]] = {
    "text": (make_text_tower, "wants input_ids: a text tower, or one for images and text together; expected one input"),
    "no-batch": (
        lambda: make_encoder(shape=[3, 32, 32]),
        "takes (3, 32, 32): no batch dimension; expected (N, 3, H, W)",
    ),
    "grey": (lambda: make_encoder(shape=["n", 1, 32, 32]), "takes (N, 1, 32, 32), which has no dimension of 3 colours"),
    "double": (lambda: make_encoder(kind=TensorProto.DOUBLE), "takes double; expected float16, float32, uint8"),
    "video": (lambda: make_encoder(shape=["n", 3, 8, 32, 32]), "takes (N, 3, 8, 32, 32); expected (N, 3, H, W) or"),
    "external": (make_external, "keeps weights in other files; expected one self-contained file. Export it again"),
    "hidden": (make_hidden_external, "keeps weights in other files; expected one self-contained file. Export it again"),
    "custom": (make_custom, "uses the operator domains com.vendor; expected standard ONNX operators"),
    "tokens": (
        lambda: make_encoder(reshape_to=(-1, 2, 8)),
        "output embedding of encoder.onnx is (1, 2, 8); expected (N, d), a vector for each image. Choose another one",
    ),
    "flat": (lambda: make_encoder(reshape_to=(-1,)), "output embedding of encoder.onnx is (16): no batch dimension"),
    "text-file": (lambda: b"GIF89a not a graph\n", "is not ONNX; expected an ONNX model"),
    "empty": (lambda: b"", "holds no network; expected an ONNX model"),
    "truncated": (lambda: make_encoder().SerializeToString()[:-700], "is not ONNX; expected an ONNX model"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_an_encoder_of_images_is_refused_in_one_line(place: Place, case: str) -> None:
    make, expected = CASES[case]
    made = make()
    data = made if isinstance(made, bytes) else made.SerializeToString()
    (place.settings.home / "encoder.onnx").write_bytes(data)
    text = refuse(place)
    assert text.startswith("params.yaml train.backbone: ")
    assert expected in text


def test_a_size_that_the_images_have_not_is_refused_with_the_number_to_set(place: Place) -> None:
    put(place, make_encoder(shape=["n", 3, 48, 48]))
    assert refuse(place) == (
        "params.yaml prepare.image_size: encoder.onnx takes images of 48 x 48, and they are prepared at 32 x 32; "
        "expected 48. Set prepare.image_size to 48."
    )


def test_an_encoder_that_can_take_one_image_only_is_refused(place: Place) -> None:
    put(place, make_encoder(shape=[1, 3, 32, 32], reshape_to=(1, 16)))
    assert refuse(place).startswith(
        "params.yaml train.backbone: encoder.onnx does not take 3 images at once (exported for 1)"
    )


def test_an_encoder_whose_vector_depends_on_the_images_beside_is_refused(place: Place) -> None:
    model = make_encoder()
    del model.graph.output[:]
    model.graph.node.append(helper.make_node("ReduceMean", ["embedding"], ["mean"], keepdims=1))
    add_output(model, "mixed", ["batch", 16], "Sub", "embedding", "mean")
    put(place, model)
    assert "gives an image another vector when others are beside it" in refuse(place)


def test_what_onnx_runtime_cannot_run_is_refused(place: Place) -> None:
    model = make_encoder()
    model.graph.node[0].input[1] = "nowhere"
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", FEATURES]))
    put(place, model)
    assert refuse(place).startswith("params.yaml train.backbone: encoder.onnx does not load (")


def test_an_encoder_too_large_for_one_file_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    put(place, make_encoder())
    embed(place)
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 3500)
    with pytest.raises(TrainingError, match=r"encoder and head together hold .* GB; expected at most 2 GB"):
        place.with_train(way="knn", **KNN).train()
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 1000)
    with pytest.raises(TrainingError, match=r"encoder.onnx has 0.0 GB; expected at most 2 GB, which is the limit"):
        place.with_train(learning_rate=0.01).train()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"backbone": "e.onnx"}, "`way: frozen` or `way: knn` with e.onnx: nothing in an ONNX file can learn"),
        ({"backbone": "e.onnx", "way": "warm"}, "`way: frozen` or `way: knn` with e.onnx"),
        ({"backbone": "E.ONNX", "way": "finetune"}, "`way: frozen` or `way: knn` with E.ONNX"),
        ({"backbone": "s3://b/e.onnx", "way": "knn"}, "`backbone_sha256` with a backbone from a URI"),
        ({"backbone": "e.onnx", "way": "knn", "weights": "w.pth"}, "`weights: none` with e.onnx"),
        ({"backbone": "resnet18", "way": "knn", "output": "x"}, "no `output` with a backbone that is known by name"),
        ({"backbone": "resnet18", "preprocessing": "imagenet"}, "no `preprocessing` with a backbone that is known"),
        (
            {"backbone": "e.onnx", "way": "knn", "preprocessing": {"mean": [0, 0, 0], "std": [1, 0, 1]}},
            "finite numbers, and `std` above 0",
        ),
    ],
)
def test_keys_that_do_not_fit_an_encoder_are_refused_before_torch(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ParamsError) as caught:
        make_params({"name": "x", "train": keys})
    assert expected in str(caught.value)


def test_a_study_over_backbones_has_no_onnx_encoder() -> None:
    with pytest.raises(ParamsError, match=r"networks known by name; 'e.onnx' is an ONNX encoder"):
        make_params({"name": "x", "tune": {"space": {"backbone": ["resnet18", "e.onnx"]}}})
    assert make_params({"name": "x", "tune": {"space": {"backbone": ["resnet18", "resnet34"]}}})


def test_a_file_that_is_not_there_is_said_before_torch_is_loaded(place: Place) -> None:
    with pytest.raises(TrainingError) as caught:
        place.check()
    home = place.settings.home
    assert str(caught.value) == (
        f"params.yaml train.backbone: {home}/encoder.onnx does not exist; expected the file of an ONNX encoder. Set "
        "train.backbone to the file of an ONNX encoder, or to a name like efficientnet_lite0."
    )


def test_what_params_say_of_an_encoder_is_known_by_its_name() -> None:
    section = Train(backbone="https://host/models/clip.onnx?sign=1", backbone_sha256="0" * 64, way="knn")
    assert (section.is_onnx, section.network_name) == (True, "clip.onnx")
    assert Train(backbone="timm/resnet18").network_name == "timm/resnet18"
    assert section.list_files(Path("/home")) == []
