"""The Open Inference Protocol by hand: the bytes that `tritonclient[http]` sends, in JSON and in binary."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from fakes import make_bundle, make_image
from visionloop.params import Serve
from visionloop.predictor import Predictor
from visionloop.serving.access import Access
from visionloop.serving.app import make_app
from visionloop.serving.body import Limits
from visionloop.serving.log import Noted, PredictionLog
from visionloop.serving.swap import ModelSlot, ServedModel
from visionloop.store.local import LocalStore

INFER = "/v2/models/fake/infer"
PIXELS_NHWC = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
TENSOR = {"name": "images", "shape": [3, 32, 32, 3], "datatype": "UINT8"}
LIMITS = Limits(max_body_bytes=2_000_000, max_files=4, cache_bytes=1_000_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("inference") / "bundle"
    make_bundle(folder)
    return ServedModel(Predictor.load(folder, threads=1), version="7")


@pytest.fixture
def client(model: ServedModel) -> Iterator[TestClient]:
    with TestClient(make_app(ModelSlot(model), LIMITS), raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, head: dict[str, Any], tail: bytes = b"", path: str = INFER) -> httpx.Response:
    text = json.dumps(head).encode()
    return client.post(path, content=text + tail, headers={"Inference-Header-Content-Length": str(len(text))})


def read_outputs(answer: httpx.Response) -> dict[str, bytes]:
    """Take the binary outputs of an answer apart."""
    length = int(answer.headers["inference-header-content-length"])
    head, tail, outputs = json.loads(answer.content[:length]), answer.content[length:], {}
    for each in head["outputs"]:
        size = each["parameters"]["binary_data_size"]
        outputs[each["name"]], tail = tail[:size], tail[size:]
    assert tail == b""
    return outputs


@pytest.mark.parametrize("data", [PIXELS_NHWC.tolist(), PIXELS_NHWC.ravel().tolist()], ids=["nested", "flat"])
def test_pixels_in_json_are_answered_as_the_predictor_does(client: TestClient, model: ServedModel, data: Any) -> None:
    answer = client.post(INFER, json={"id": "mine", "inputs": [{**TENSOR, "data": data}]})
    outputs = model.predictor.run(PIXELS_NHWC)
    assert answer.json() == {
        "id": "mine",
        "model_name": "fake",
        "model_version": "7",
        "parameters": {
            "request_id": answer.json()["parameters"]["request_id"],
            "digest": model.digest,
            "engine": "onnxruntime fp32",
        },
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [3, 3],
                "data": pytest.approx(outputs.probs_nk.ravel().tolist(), abs=1e-6),
            },
            {
                "name": "label",
                "datatype": "BYTES",
                "shape": [3],
                "data": ["abc"[k] for k in outputs.probs_nk.argmax(axis=1)],
            },
            {"name": "abstained", "datatype": "BOOL", "shape": [3], "data": [False] * 3},
        ],
    }


def test_pixels_in_binary_come_back_in_binary(client: TestClient, model: ServedModel) -> None:
    tensor = {**TENSOR, "parameters": {"binary_data_size": PIXELS_NHWC.nbytes}}
    answer = ask(client, {"parameters": {"binary_data_output": True}, "inputs": [tensor]}, PIXELS_NHWC.tobytes())
    found, outputs = read_outputs(answer), model.predictor.run(PIXELS_NHWC)
    assert np.frombuffer(found["probabilities"], "<f4") == pytest.approx(outputs.probs_nk.ravel(), abs=1e-6)
    letters = ["abc"[k] for k in outputs.probs_nk.argmax(axis=1)]
    assert found["label"] == b"".join(b"\x01\x00\x00\x00" + letter.encode() for letter in letters)
    assert found["abstained"] == bytes(3)
    wanted = [{"name": "embedding", "parameters": {"binary_data": True}}]
    answer = ask(client, {"inputs": [tensor], "outputs": wanted}, PIXELS_NHWC.tobytes())
    assert read_outputs(answer).keys() == {"embedding"}
    embedding = np.frombuffer(read_outputs(answer)["embedding"], "<f4")
    assert embedding == pytest.approx(outputs.embedding_nd.ravel(), abs=1e-6)


@pytest.mark.parametrize("is_binary", [True, False])
def test_files_are_answered_as_predict_does_and_written_down(
    tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch, is_binary: bool
) -> None:
    files = [make_image(1), make_image(2, size_hw=(50, 40))]
    log, noted = PredictionLog("fake", LocalStore(tmp_path / "store"), tmp_path / "spool", Serve()), list[Noted]()
    monkeypatch.setattr(log, "note", noted.append)
    tensor: dict[str, Any] = {"name": "images", "shape": [2], "datatype": "BYTES"}
    with TestClient(make_app(ModelSlot(model), LIMITS, log=log)) as client:
        if is_binary:
            tail = b"".join(len(data).to_bytes(4, "little") + data for data in files)
            answer = ask(client, {"inputs": [{**tensor, "parameters": {"binary_data_size": len(tail)}}]}, tail)
        else:
            texts = [base64.b64encode(data).decode() for data in files]
            answer = client.post(INFER, json={"inputs": [{**tensor, "data": texts}]})
        client.post(INFER, json={"inputs": [{**TENSOR, "data": PIXELS_NHWC.tolist()}]})  # has no file: not written
        figures = client.get("/metrics").text
    expected = [one.prediction for one in model.predictor.predict(files)]
    assert answer.json()["outputs"][1]["data"] == expected
    request_id = answer.json()["parameters"]["request_id"]
    assert [one.request_id for one in noted] == [f"{request_id}.0", f"{request_id}.1"]
    assert [(one.data, one.answer.prediction) for one in noted] == list(zip(files, expected, strict=True))
    assert 'visionloop_requests_total{outcome="ok",status="200"} 2.0' in figures
    assert 'visionloop_answered_images_total{by="network"} 5.0' in figures


def test_pixels_are_never_answered_from_the_answer_for_a_file_of_the_same_bytes(
    client: TestClient, model: ServedModel
) -> None:
    file = make_image(1, size_hw=(32, 32))
    file += bytes(PIXELS_NHWC[0].nbytes - len(file))  # a PNG may have anything behind its end
    first = client.post("/predict", content=file).json()
    tensor = {**TENSOR, "shape": [1, 32, 32, 3], "parameters": {"binary_data_size": len(file)}}
    answer = ask(client, {"inputs": [tensor]}, file).json()
    pixels = np.frombuffer(file, np.uint8).reshape(1, 32, 32, 3)
    expected = model.predictor.run(pixels).probs_nk[0]
    assert answer["outputs"][0]["data"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert list(first["probabilities"].values()) != pytest.approx(expected.tolist(), abs=1e-3)
    assert client.post("/predict", content=file).json()["probabilities"] == first["probabilities"]


def test_health_and_metadata_say_what_is_served(client: TestClient) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/fake/ready").json() == {"name": "fake", "ready": True}
    metadata = client.get("/v2/models/fake/versions/7").json()
    assert metadata == client.get("/v2/models/fake").json()
    assert metadata["versions"] == ["7"]
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert [(each["name"], each["datatype"], each["shape"]) for each in metadata["outputs"]] == [
        ("probabilities", "FP32", [-1, 3]),
        ("label", "BYTES", [-1]),
        ("abstained", "BOOL", [-1]),
        ("embedding", "FP32", [-1, -1]),
    ]


@pytest.mark.parametrize("path", ["models/other", "models/fake/versions/8", "models/other/ready", "nothing"])
def test_what_is_not_there_is_404_in_the_form_of_the_protocol(client: TestClient, path: str) -> None:
    answer = client.get(f"/v2/{path}")
    assert (answer.status_code, list(answer.json())) == (404, ["error"])
    assert answer.headers["content-type"] == "application/json"


def test_a_server_that_stops_or_has_no_model_is_not_ready(model: ServedModel) -> None:
    slot = ModelSlot(model)
    with TestClient(make_app(slot)) as client:
        slot.is_leaving = True
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/models/fake/ready").json() == {"error": "request: the server stops. Ask another one."}
        assert client.get("/v2/health/live").status_code == 200
        slot.is_leaving, slot.current = False, None
        for path in ("health/ready", "models/fake/ready", "models/fake"):
            assert client.get(f"/v2/{path}").status_code == 503


DATA = PIXELS_NHWC.tolist()


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({"name": "image"}, "inputs.0.name"),
        ({"datatype": "FP32"}, "inputs.0.datatype"),
        ({"shape": [3, 31, 32, 3]}, "its input is UINT8 [3, 31, 32, 3]; expected UINT8 [n, 32, 32, 3] or BYTES [n]"),
        ({"shape": [3, 3, 32, 32]}, "its input is UINT8 [3, 3, 32, 32]"),
        ({"shape": [0, 32, 32, 3]}, "it has 0 images; expected 1 to 4"),
        ({"shape": [5, 32, 32, 3]}, "it has 5 images; expected 1 to 4"),
        ({"shape": [2**70, 32, 32, 3]}, f"it has {2**70} images"),
        ({"shape": [-1, 32, 32, 3]}, "inputs.0.shape.0"),
        ({"data": DATA[:2]}, "nested in another way"),
        ({"data": [256] * 9216}, "something else than whole numbers from 0 to 255"),
        ({"data": [0.5] * 9216}, "something else than whole numbers"),
        ({"data": ["a"] * 9216}, "something else than whole numbers"),
        ({"data": [[[[0, 0, 0]], None]]}, "nested in another way"),
        ({"data": [0] * 9215}, "its tensor has 9215 values; expected 9216 by its shape"),
        ({"data": None}, "neither"),
        ({"parameters": {"binary_data_size": 9216}}, "both"),
        ({"parameters": {"shared_memory_region": "x"}}, "inputs.0.parameters.shared_memory_region"),
        ({"datatype": "BYTES", "shape": [3]}, "data[0]"),
        ({"datatype": "BYTES", "shape": [2], "data": ["aGk="]}, "its tensor has 1 values; expected 2"),
        ({"datatype": "BYTES", "shape": [2], "data": ["aGk=", "aGk="]}, "images that cannot be used: 0 (is"),
    ],
)
def test_a_tensor_that_does_not_fit_is_a_400_that_says_why(
    client: TestClient, tensor: dict[str, Any], said: str
) -> None:
    answer = client.post(INFER, json={"inputs": [{**TENSOR, "data": DATA, **tensor}]})
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    ("head", "tail", "said"),
    [
        ({"binary_data_size": 9216}, PIXELS_NHWC.tobytes()[:-1], "9215 bytes follow its head"),
        ({"binary_data_size": 9215}, PIXELS_NHWC.tobytes()[:-1], "its tensor has 9215 values"),
        ({}, b"x", "neither"),
    ],
)
def test_bytes_that_do_not_fit_the_head_are_refused(
    client: TestClient, head: dict[str, Any], tail: bytes, said: str
) -> None:
    answer = ask(client, {"inputs": [{**TENSOR, "parameters": head}]}, tail)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    "tail", [b"\x02\x00\x00\x00hi", b"\xff\xff\xff\xffhi\x00\x00", b"\x00" * 4, b"\x00" * 9, b"\x01\x00"]
)
def test_elements_that_do_not_fit_their_lengths_are_refused(client: TestClient, tail: bytes) -> None:
    tensor = {"name": "images", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(tail)}}
    answer = ask(client, {"inputs": [tensor]}, tail)
    assert answer.status_code == 400
    assert "BYTES" in answer.json()["error"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"inputs": []}', b'{"inputs": [' + b"[]," * 50_000])
def test_a_body_that_is_no_request_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post(INFER, content=body)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


def test_very_many_values_are_refused_before_they_are_parsed(model: ServedModel) -> None:
    with TestClient(make_app(ModelSlot(model))) as client:
        for each in (b"[],", b"{},", b"0,"):
            answer = client.post(INFER, content=b'{"inputs": [' + each * 2_000_001)
            assert "Send the tensor flat, or in binary." in answer.json()["error"]


@pytest.mark.parametrize("length", ["100000", "-1", "x"])
def test_a_length_of_the_head_that_cannot_be_is_refused(client: TestClient, length: str) -> None:
    answer = client.post(INFER, content=b"{}", headers={"Inference-Header-Content-Length": length})
    assert (answer.status_code, list(answer.json())) == (400 if length == "100000" else 422, ["error"])


def test_the_limits_hold_as_everywhere(model: ServedModel) -> None:
    with TestClient(make_app(ModelSlot(model), LIMITS, Access(rate_per_s=3))) as client:
        assert client.post(INFER, content=b"a" * 2_000_001).status_code == 413
        assert client.post(INFER, json={"inputs": [{**TENSOR, "data": DATA}]}).status_code == 200
        answer = client.post(INFER, json={"inputs": [{**TENSOR, "data": DATA}]})
        assert (answer.status_code, list(answer.json())) == (429, ["error"])  # 1 and 3 images of 3 a second
        assert client.get("/v2/health/ready").status_code == 200
    with TestClient(make_app(ModelSlot(model), Limits(max_queue=2))) as client:
        answer = client.post(INFER, json={"inputs": [{**TENSOR, "data": DATA}]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
