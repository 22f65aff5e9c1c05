"""An encoder of one's own: an ONNX file embeds, trains and is served as one graph with its head, or is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from encoders import (
    CLIP,
    CLIP_MEAN,
    CLIP_STD,
    FEATURES,
    add_output,
    compute_embeddings,
    copy_place,
    make_encoder,
    make_home,
    put,
    refuse,
)
from http_server import Answer, serve
from processors import Stopwatch, pretending
from s3_server import make_bucket, make_client, point_to, serve_s3
from shapes import make_environment, visionloop_here
from trainings import Ear, Place, read_json
from visionloop.bundle import load_bundle
from visionloop.data.shards import load_prepared
from visionloop.errors import DatasetError, ParamsError
from visionloop.features.embed import embed
from visionloop.features.encoder import make_bundle_encoder
from visionloop.features.view import load_features
from visionloop.networks import processor
from visionloop.pipeline import hash_weights_file
from visionloop.predictor import Predictor

KNN = {"neighbours": {"k": 3}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("encoders") / "ws")


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Place:
    return copy_place(made, tmp_path / "ws")


def read_images(place: Place) -> Any:
    prepared = load_prepared(place.settings.prepared_dir)
    return prepared.read(np.arange(len(prepared.sha256_n)))


KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "nchw": ({}, 1e-5),
    "nhwc": ({"layout": "NHWC"}, 1e-5),
    "any-size": ({"shape": ["batch", 3, "height", "width"]}, 1e-5),
    "any-channels": ({"shape": ["batch", "channels", "height", "width"]}, 1e-5),
    "nhwc-any-size": ({"layout": "NHWC", "shape": ["batch", "height", "width", 3]}, 1e-5),
    "batch-of-1": ({"shape": [1, 3, 32, 32]}, 1e-5),
    "fp16": ({"kind": TensorProto.FLOAT16}, 5e-3),
    "old": ({"opset": 13}, 1e-5),
    "new": ({"opset": 21}, 1e-5),
}
FEW = ("nhwc", "batch-of-1", "fp16")


@pytest.mark.parametrize(("way", "kind"), [*(("frozen", kind) for kind in KINDS), *(("knn", kind) for kind in FEW)])
def test_any_encoder_of_images_ends_as_one_graph_that_gives_its_vectors(place: Place, way: str, kind: str) -> None:
    options, tolerance = KINDS[kind]
    put(place, make_encoder(**options))
    place = place.with_train(way=way, **KNN)
    assert embed(place).num_computed == 72
    prepared, images = load_prepared(place.settings.prepared_dir), read_images(place)
    known_nd = compute_embeddings(images)
    scale = float(np.abs(known_nd).max())
    embedding_nd, facts = load_features(place.settings.features_dir, prepared)
    np.testing.assert_allclose(embedding_nd, known_nd, rtol=0, atol=tolerance * scale)
    assert (facts.backbone, facts.runtime) == ("encoder.onnx", "onnxruntime")

    note = place.train()
    bundle = load_bundle(place.settings.candidate_dir, expected_digest=note.bundle)
    outputs = Predictor.load(bundle.folder).run_batches(images)
    np.testing.assert_allclose(outputs.embedding_nd, known_nd, rtol=0, atol=tolerance * scale)
    assert outputs.logits_nk.shape == (72, 2)
    head = load_file(bundle.folder / "weights.safetensors")
    assert all(name.startswith("head.") for name in head), "the encoder is in model.onnx"
    if way == "frozen":
        units_n = outputs.embedding_nd @ head["head.weight"][0] + head["head.bias"][0]
        np.testing.assert_allclose(outputs.logits_nk[:, 1], units_n, atol=1e-4)
    assert bundle.card.parity <= 1e-4
    model = onnx.load(bundle.folder / "model.onnx")
    assert [value.name for value in model.graph.output] == ["logits", "embedding"]
    assert [value.name for value in model.graph.input] == ["images"]
    onnx.checker.check_model(model, full_check=True)


def test_the_bundle_needs_nothing_beside_it_and_has_the_same_bytes_again(place: Place, tmp_path: Path) -> None:
    put(place, make_encoder())
    embed(place)
    place.train()
    before = (place.settings.candidate_dir / "model.onnx").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(place.settings.candidate_dir, tmp_path / "elsewhere" / "bundle")
    shutil.rmtree(place.settings.work_dir("train"))
    shutil.rmtree(place.settings.hidden_dir / "encoders")
    shutil.rmtree(place.settings.features_dir)
    embed(place)
    place.train()
    assert (place.settings.candidate_dir / "model.onnx").read_bytes() == before
    images = read_images(place)
    shutil.rmtree(place.settings.home)
    bundle = load_bundle(tmp_path / "elsewhere" / "bundle")
    vectors_nd = make_bundle_encoder(bundle).embed(images)
    np.testing.assert_allclose(vectors_nd, compute_embeddings(images), rtol=0, atol=1e-4)
    card = bundle.card.network
    assert card["backbone"] == "encoder.onnx"
    assert card["encoder"]["output"] == "embedding"
    assert card["encoder"]["pixels"] == "params.yaml (imagenet)"
    assert card["weights_file"] == "the head alone; the encoder is in model.onnx"
    assert card["preprocessing"] == {"mean_c": [0.485, 0.456, 0.406], "std_c": [0.229, 0.224, 0.225]}


def test_the_faster_runtime_is_taken_and_torch_is_none_of_them(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    put(place, make_encoder(layout="NHWC"))

    def set_runtime(runtime: str) -> Place:
        section = place.params.embed.model_copy(update={"runtime": runtime})
        return replace(place, params=place.params.model_copy(update={"embed": section}))

    ear, watch = Ear(), Stopwatch(onnxruntime_fp32=10.0, openvino_fp32=20.0)
    monkeypatch.setattr(processor, "time_in_turn", watch)
    with pretending("fp32", tmp_path):
        embed(set_runtime("auto"), tell=ear.tell)
    assert ear.said("embeds by openvino fp32: 20 images/s against 10 in onnxruntime fp32 (measured once")
    embedding_nd, facts = load_features(place.settings.features_dir, load_prepared(place.settings.prepared_dir))
    assert facts.runtime == "openvino"
    known_nd = compute_embeddings(read_images(place))
    np.testing.assert_allclose(embedding_nd, known_nd, rtol=0, atol=1e-4 * np.abs(known_nd).max())
    text = refuse(set_runtime("torch"), ParamsError, kept=1)
    assert text.startswith("params.yaml embed.runtime: got 'torch', which cannot run an ONNX encoder; expected auto, ")


def test_embedding_with_an_onnx_encoder_loads_no_torch(place: Place) -> None:
    put(place, make_encoder())
    code = (
        "import sys; sys.argv = ['visionloop', 'embed']\nfrom visionloop.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place.settings.home,
        env=make_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "encoder.onnx (sha256 " in done.stdout
    assert "pixels as params.yaml (imagenet) says" in done.stdout


def test_uint8_goes_in_as_it_is(place: Place) -> None:
    model = make_encoder(kind=TensorProto.UINT8, layout="NHWC")
    put(place, model)
    assert refuse(place).startswith("params.yaml train.preprocessing: is set, but encoder.onnx takes uint8")
    place = place.with_train(preprocessing=None)
    ear = Ear()
    embed(place, tell=ear.tell)
    assert ear.said("pixels as they are, for it takes bytes")
    images = read_images(place)
    known_nd = compute_embeddings(images, (0.0,) * 3, (1 / 255,) * 3)
    embedding_nd, _ = load_features(place.settings.features_dir, load_prepared(place.settings.prepared_dir))
    np.testing.assert_allclose(embedding_nd, known_nd, rtol=1e-3, atol=1e-5 * np.abs(known_nd).max())
    assert place.train().bundle


def test_pixels_are_read_from_the_file_of_hugging_face_and_a_change_there_is_another_encoder(place: Place) -> None:
    put(place, make_encoder())
    place = place.with_train(preprocessing=None)
    text = refuse(place)
    assert text.startswith("params.yaml train.backbone: nothing says which pixels encoder.onnx wants; expected")
    beside = place.settings.home / "preprocessor_config.json"
    beside.write_text(json.dumps(CLIP))
    before = hash_weights_file(place.settings.home, place.params)
    ear = Ear()
    embed(place, tell=ear.tell)
    assert ear.said("pixels as preprocessor_config.json says: (x / 255 - mean) / std, mean 0.4815, 0.4578, 0.4082")
    images, prepared = read_images(place), load_prepared(place.settings.prepared_dir)
    embedding_nd, facts = load_features(place.settings.features_dir, prepared)
    np.testing.assert_allclose(embedding_nd, compute_embeddings(images, CLIP_MEAN, CLIP_STD), atol=1e-4)
    place.train()
    card = read_json(place.settings.candidate_dir / "card.json")["network"]
    assert card["preprocessing"] == {
        "mean_c": list(CLIP_MEAN),
        "std_c": list(CLIP_STD),
        "side_px": 32,
        "interpolation": "bicubic",
        "crop_ratio": 1.0,
    }
    assert card["encoder"]["pixels"] == "preprocessor_config.json"

    beside.write_text(json.dumps({**CLIP, "do_normalize": False}))
    assert hash_weights_file(place.settings.home, place.params) != before
    with pytest.raises(DatasetError, match=r"are of another network \(encoder.onnx at 32 x 32"):
        place.train()
    embed(place)
    embedding_nd, other = load_features(place.settings.features_dir, prepared)
    assert other.digest != facts.digest
    np.testing.assert_allclose(embedding_nd, compute_embeddings(images, (0.0,) * 3, (1.0,) * 3), atol=1e-4)


def test_a_changed_file_of_the_same_name_is_embedded_and_trained_anew(place: Place) -> None:
    put(place, make_encoder())
    embed(place)
    first = place.train().bundle
    before = hash_weights_file(place.settings.home, place.params)
    ear = Ear()
    assert place.train(ear).bundle == first
    assert ear.said("this training is finished already")
    put(place, make_encoder(seed=1))
    assert hash_weights_file(place.settings.home, place.params) not in {before, ""}
    with pytest.raises(
        DatasetError, match=r"are of another network .*expected those of encoder.onnx\. Run `visionloop"
    ):
        place.train()
    assert embed(place).num_computed == 72
    assert place.train().bundle != first
    assert place.params.train.backbone == "encoder.onnx"


def test_several_outputs_have_to_be_chosen_among(place: Place) -> None:
    model = make_encoder()
    add_output(model, "last_hidden_state", ["batch", 8, 1, 1], "Identity", "maps")
    model.graph.output[0].type.tensor_type.shape.CopyFrom(
        helper.make_tensor_value_info("x", 1, ["batch", FEATURES]).type.tensor_type.shape
    )
    put(place, model)
    assert refuse(place) == (
        "params.yaml train.output: is not set, and encoder.onnx has 2 outputs; expected one of embedding (N, 16), "
        "last_hidden_state (N, 8, 1, 1). Set it to the one that is a vector for each image."
    )
    assert refuse(place.with_train(output="pooled")).startswith(
        "params.yaml train.output: got 'pooled'; expected one of "
    )
    for name, width in (("last_hidden_state", 8), ("embedding", 16)):
        there = place.with_train(output=name)
        embed(there)
        there.train()
        model = onnx.load(there.settings.candidate_dir / "model.onnx")
        assert model.graph.output[1].type.tensor_type.shape.dim[1].dim_value == width
        has_dense = any(t.name.endswith("/w1") for t in model.graph.initializer)
        assert has_dense == (name == "embedding"), "what an output does not need is not carried along"


def test_the_image_tower_of_a_model_with_both_is_cut_out(place: Place) -> None:
    model = make_encoder()
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]))
    graph.node.append(helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("ReduceSum", ["ids"], ["text"], keepdims=1))
    add_output(model, "both", None, "Add", "text", "embedding")
    put(place, model)
    assert "has 2 outputs; expected one of embedding (any shape), both" in refuse(place)
    assert refuse(place.with_train(output="both")).startswith(
        "params.yaml train.backbone: encoder.onnx wants images, input_ids: a text tower, or one for images and text "
        "together; expected one input of images. Export the image tower alone"
    )
    embed(place.with_train(output="embedding"))
    assert place.with_train(output="embedding").train().bundle


def test_an_encoder_comes_from_a_bucket_or_the_web_with_its_digest(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_encoder().SerializeToString()
    sha256 = hashlib.sha256(data).hexdigest()
    known_nd = compute_embeddings(read_images(place))

    def use(address: str, digest: str = sha256) -> Place:
        shutil.rmtree(place.settings.hidden_dir / "weights", ignore_errors=True)
        shutil.rmtree(place.settings.hidden_dir / "encoders", ignore_errors=True)
        return place.with_train(backbone=address, backbone_sha256=digest)

    with serve_s3() as endpoint, serve({"/encoder.onnx": Answer(data)}) as site:
        point_to(monkeypatch, endpoint)
        make_bucket(endpoint, "models")
        make_client(endpoint).put_object(Bucket="models", Key="vision/encoder.onnx", Body=data)
        for address in ("s3://models/vision/encoder.onnx", f"{site.url}/encoder.onnx?signature=secret"):
            there = use(address)
            embed(there)
            embedding_nd, facts = load_features(there.settings.features_dir, load_prepared(there.settings.prepared_dir))
            np.testing.assert_allclose(embedding_nd, known_nd, atol=1e-4)
            assert facts.backbone == "encoder.onnx"
            assert [path.name for path in (there.settings.hidden_dir / "weights").iterdir()] == [sha256]
            assert there.train().bundle
        wrong = refuse(use(f"{site.url}/encoder.onnx?signature=secret", "0" * 64))
        assert wrong.endswith(
            "Correct train.backbone or train.backbone_sha256; if both are right, the file was changed."
        )
        assert "secret" not in wrong
        assert refuse(use("s3://models/none.onnx")).startswith(
            "params.yaml train.backbone: there is no s3://models/none"
        )
    (place.settings.home / "encoder.onnx").write_bytes(data)
    text = refuse(use("encoder.onnx", "1" * 64))
    assert text.startswith(
        f"params.yaml train.backbone: encoder.onnx has the sha256 {sha256[:12]}; expected 111111111111."
    )
    without = use("s3://models/vision/encoder.onnx").with_train(preprocessing=None)
    (without.settings.hidden_dir / "weights").mkdir()
    (without.settings.hidden_dir / "weights" / sha256).write_bytes(data)
    assert "nothing says which pixels encoder.onnx wants" in refuse(without)


def test_commands_look_through_an_encoder_and_through_the_bundle_that_holds_it(place: Place) -> None:
    put(place, make_encoder(layout="NHWC"))
    embed(place)
    place.train()
    home = place.settings.home
    photo = str(next((home / "photos" / "ring").glob("*.png")))
    distances = []
    for encoder in ("params", "candidate"):
        done = visionloop_here(home, "similar", photo, "--k", "2", "--json", "--encoder", encoder)
        assert done.returncode == 0, done.stderr
        matches = json.loads(done.stdout)["queries"][0]["matches"]
        assert matches[0]["labels"] == ["ring"]
        distances.append([match["distance"] for match in matches])
    np.testing.assert_allclose(*distances, atol=1e-5)
    done = visionloop_here(home, "suspects")
    assert "of 72 images have a label that their nearest 10 doubt" in done.stdout, done.stderr
    done = visionloop_here(home, "map", "--encoder", "candidate", "--method", "pca")
    assert done.returncode == 0 and "encoder.onnx of bundle" in done.stdout, done.stderr
    done = visionloop_here(home, "predict", photo, "--bundle", "models/candidate")
    assert done.returncode == 0 and "ring" in done.stdout, done.stderr
