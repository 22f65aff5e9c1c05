import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from fakes import make_bundle, make_image
from visionloop.bundle import load_bundle
from visionloop.predictor import FP32, INT8, Predictor
from visionloop.serving import batcher
from visionloop.serving.app import make_app
from visionloop.serving.body import Limits
from visionloop.serving.schemas import ErrorAnswer
from visionloop.serving.swap import ModelSlot, ServedModel

LIMITS = Limits(max_body_bytes=200_000, max_pixels=10_000, max_files=4, max_queue=4)


@pytest.fixture
def slot(bundle_dir: Path) -> ModelSlot:
    return ModelSlot(ServedModel(Predictor.load(bundle_dir, threads=1), version="7", entry=3))


@pytest.fixture
def client(slot: ModelSlot) -> Iterator[TestClient]:
    with TestClient(make_app(slot, LIMITS), raise_server_exceptions=False) as client:
        yield client


def read_figures(client: TestClient) -> dict[str, float]:
    """Return `name{label value,...}` -> value of all figures."""
    samples = [s for family in text_string_to_metric_families(client.get("/metrics").text) for s in family.samples]
    return {f"{s.name}{{{','.join(s.labels.values())}}}": s.value for s in samples}


def test_a_fresh_interpreter_that_imports_the_app_holds_no_heavy_library() -> None:
    code = "import sys, json, visionloop.serving.app; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(done.stdout))
    assert "visionloop" in loaded
    assert not loaded & {"torch", "torchvision", "lightning", "pytorch_lightning", "prefect", "dvc", "mlflow", "boto3"}


def test_predict_answers_a_raw_body_as_the_predictor_does(client: TestClient, slot: ModelSlot) -> None:
    data = make_image(1)
    answer = client.post("/predict", content=data, headers={"X-Request-ID": "mine-1"})
    assert slot.current
    [expected] = slot.current.predictor.predict([data])
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json() == {
        "prediction": expected.prediction,
        "confidence": pytest.approx(expected.confidence),
        "abstained": None,
        "probabilities": pytest.approx(expected.probabilities),
        "timing": answer.json()["timing"],
        "model": {"name": "fake", "version": "7", "digest": slot.current.digest, "engine": "onnxruntime fp32"},
        "request_id": answer.json()["request_id"],
        "client_request_id": "mine-1",
    }
    assert re.fullmatch(r"[0-9a-f]{24}", answer.json()["request_id"])


def test_a_repeated_image_says_so_and_gives_all_that_is_asked_for(slot: ModelSlot) -> None:
    with TestClient(make_app(slot, Limits(cache_bytes=1_000_000))) as client:
        data = make_image(1)
        first = client.post("/predict?top_k=1", content=data).json()
        second = client.post("/predict?embedding=true", content=data).json()
        assert first["timing"].keys() == {"queue_ms", "decode_ms", "network_ms", "cached"}
        assert first["timing"]["cached"] is False
        assert first["timing"]["network_ms"] > 0
        assert second["timing"] == {"queue_ms": 0, "decode_ms": 0, "network_ms": 0, "cached": True}
        assert (len(first["probabilities"]), len(second["probabilities"])) == (1, 3)
        assert len(second["embedding"]) == 48
        assert first["prediction"] == second["prediction"]
        assert first["request_id"] != second["request_id"]
        several = client.post("/predict", files=[("f", ("a.png", data)), ("f", ("b.png", make_image(2)))]).json()
        assert [one["timing"]["cached"] for one in several["results"]] == [True, False]
        figures = client.get("/metrics").text
        assert 'visionloop_answered_images_total{by="cache"} 2.0' in figures
        assert 'visionloop_answered_images_total{by="network"} 2.0' in figures


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("/predict?topk=1", "query 'topk' is no option; expected top_k."),
        ("/predict?top_k=1&x=1", "query 'x' is no option; expected one of top_k, embedding."),
        ("/predict?top_k=1&top_k=2", "query top_k is there twice; expected it once."),
        ("/predict?" + "y" * 5000, f"query {'y' * 40!r} is no option; expected one of top_k, embedding."),
        ("/similar?top_k=1", "query 'top_k' is no option; expected k."),
        ("/feedback?label=cat", "query 'label' is no option; expected none."),
        ("/admin/reload?now", "query 'now' is no option; expected none."),
    ],
)
def test_an_option_that_there_is_not_or_twice_is_refused(client: TestClient, address: str, said: str) -> None:
    answer = client.post(address, content=make_image(1))
    assert (answer.status_code, answer.json()["code"], answer.json()["detail"]) == (
        422,
        "bad_option",
        f"request: {said}",
    )
    assert client.get("/health/live?t=1").status_code == 200, "probes and pages add what they like"


def test_an_answer_and_ready_name_the_engine(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", engines=[FP32, INT8])
    model = ServedModel(Predictor(load_bundle(tmp_path / "bundle"), threads=1, engine=INT8))
    with TestClient(make_app(ModelSlot(model))) as client:
        answers = [
            client.post("/predict", content=make_image(1)),
            client.post("/predict", files=[("f", ("a.png", make_image(1))), ("f", ("b.png", make_image(2)))]),
            client.get("/health/ready"),
        ]
        assert [answer.json()["model"]["engine"] for answer in answers] == [INT8] * 3
        assert client.get("/model").json()["engine"] == INT8


def test_predict_answers_a_form_with_one_file_as_a_raw_body(client: TestClient) -> None:
    data = make_image(2, kind="JPEG")
    raw, form = client.post("/predict", content=data), client.post("/predict", files={"photo": ("p.jpg", data)})
    assert raw.json()["probabilities"] == form.json()["probabilities"]
    assert re.fullmatch(r"[0-9a-f]{24}", form.json()["request_id"])


def test_a_broken_file_among_several_spoils_no_other(client: TestClient) -> None:
    sent = [("files", ("a.png", make_image(1))), ("files", ("b.jpg", b"text")), ("files", ("c.webp", make_image(2)))]
    answer = client.post("/predict", files=sent).json()
    assert [result["file"] for result in answer["results"]] == ["a.png", "b.jpg", "c.webp"]
    assert answer["results"][0]["prediction"] in {"a", "b", "c"}
    assert answer["results"][1]["error"]["code"] == "not_an_image"
    assert answer["results"][2]["probabilities"].keys() == {"a", "b", "c"}
    assert answer["model"]["version"] == "7"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "empty"),
        (b"a" * 200_001, 413, "body_too_large"),
        (b"hello", 415, "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not_an_image"),
        (make_image(0, kind="GIF"), 415, "not_an_image"),
        (make_image(0, kind="JPEG")[:-40], 422, "damaged"),
        (make_image(0, size_hw=(100, 101)), 422, "too_large"),
    ],
)
def test_bad_bodies_get_their_own_4xx_in_one_shape(client: TestClient, body: bytes, status: int, code: str) -> None:
    answer = client.post("/predict", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json().keys() == set(ErrorAnswer.model_fields)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "/" not in answer.json()["error"]["message"]
    assert read_figures(client)[f"visionloop_requests_total{{{code},{status}}}"] == 1


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/predict", 405), ("GET", "/nope", 404)])
def test_wrong_routes_answer_in_the_same_shape(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("sent", ["a b", "x" * 65, "<script>", "é".encode().decode("latin-1")])
def test_an_unsafe_request_id_is_replaced(client: TestClient, sent: str) -> None:
    answer = client.get("/health/live", headers={b"X-Request-ID": sent.encode("latin-1")})
    assert re.fullmatch(r"[0-9a-f]{24}", answer.headers["x-request-id"])


def test_without_a_model_it_is_alive_but_not_ready(client: TestClient, slot: ModelSlot) -> None:
    slot.current, slot.problem = None, "ledger entry 1 is not served"
    assert client.get("/health/live").status_code == 200
    for answer in (client.get("/health/ready"), client.get("/model"), client.post("/predict", content=make_image(0))):
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"] == {
            "code": "not_ready",
            "message": "request: no model is ready (ledger entry 1 is not served). Try again in a moment.",
        }


def test_ready_and_model_tell_what_is_served_and_what_is_not(client: TestClient, slot: ModelSlot) -> None:
    slot.problem = "ledger entry 4 is not served: bundle_error: it is damaged"
    assert slot.current
    name = {"name": "fake", "version": "7", "digest": slot.current.digest, "engine": "onnxruntime fp32"}
    assert client.get("/health/ready").json() == {"status": "ready", "model": name, "problem": slot.problem}
    model = client.get("/model").json()
    assert model == {
        **name,
        "entry": 3,
        "since": None,
        "task": "multiclass",
        "classes": ["a", "b", "c"],
        "image_size": [32, 32],
        "resize": "squash",
        "threshold": None,
        "thresholds": None,
        "abstain": None,
        "dataset": {"name": "fake", "version": 1, "digest": "0" * 64},
        "problem": slot.problem,
        "runtime": {"engine": "onnxruntime fp32", "why": "onnxruntime fp32"},
    }


def test_a_full_queue_is_a_503_that_says_when_to_come_back(slot: ModelSlot) -> None:
    with TestClient(make_app(slot, Limits(max_queue=1))) as client:
        answer = client.post("/predict", files=[("file", ("a", make_image(0))), ("file", ("b", make_image(1)))])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "busy"


def test_the_split_of_the_cores_follows_the_model(slot: ModelSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.serving.decoding.count_cores", lambda: 2)
    assert slot.current
    decode, lock, now, most = batcher.load_sized_array, threading.Lock(), 0, 0

    def slow(*args: Any, **options: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return decode(*args, **options)

    monkeypatch.setattr(batcher, "load_sized_array", slow)
    found = []
    with TestClient(make_app(slot)) as client:
        for decoders in (0, 3, 1):
            slot.current, most = replace(slot.current, decoders=decoders), 0
            client.post("/predict", files=[("f", (f"{seed}.png", make_image(seed))) for seed in range(6)])
            found.append(most)
    assert found == [1, 3, 1]


def test_our_own_bug_is_a_500_without_its_text(
    client: TestClient, slot: ModelSlot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(images_nhwc: object) -> None:
        raise RuntimeError("/secret/path")

    assert slot.current
    monkeypatch.setattr(slot.current.predictor, "run", fail)
    answer = client.post("/predict", content=make_image(0), headers={"X-Request-ID": "r-1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "r-1")
    assert answer.json() == {
        "type": "about:blank",
        "title": "Internal Server Error",
        "status": 500,
        "code": "internal",
        "detail": answer.json()["error"]["message"],
        "error": {"code": "internal", "message": "server: an unexpected error; see its log under the request id."},
        "request_id": answer.json()["request_id"],
        "client_request_id": "r-1",
    }
    assert f"request {answer.json()['request_id']} failed (the client's id: r-1)" in caplog.text
    assert "RuntimeError: /secret/path" in caplog.text
    assert read_figures(client)["visionloop_requests_total{internal,500}"] == 1


def test_metrics_count_requests_images_batches_and_the_model(client: TestClient, slot: ModelSlot) -> None:
    data = make_image(1)
    (chosen,) = {client.post("/predict", content=data).json()["prediction"] for _ in range(3)}
    client.post("/predict", content=b"text")
    slot.num_swaps, slot.num_failures, slot.problem = 2, 5, "a problem"
    figures = read_figures(client)
    assert slot.current
    assert figures["visionloop_requests_total{ok,200}"] == 3
    assert figures["visionloop_request_seconds_count{}"] == 4
    assert figures[f"visionloop_predicted_images_total{{{chosen}}}"] == 3
    assert figures["visionloop_batch_images_sum{}"] == 3
    assert figures["visionloop_queue_images{}"] == 0
    assert figures["visionloop_swaps_total{}"] == 2
    assert figures["visionloop_swap_failures_total{}"] == 5
    assert figures["visionloop_swap_problem{}"] == 1
    model_info = next(key for key in figures if key.startswith("visionloop_model_info"))
    assert set(model_info[len("visionloop_model_info{") : -1].split(",")) == {"fake", "7", slot.current.digest}


def test_docs_is_one_page_that_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "connect-src 'self'" in policy
    assert "unsafe-inline" not in policy
    for tag in ("script", "style"):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.findall(r" (?:style|on[a-z]+)=", page.text), "the policy lets none of them work"
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page.text)


def test_the_page_for_people_loads_its_own_files_alone(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    names = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert names == ["page/home.css", "page/home.js"]
    for name in (*names, "page/api.js", "page/cards.js", "page/parts.js"):
        file = client.get(f"/{name}")
        assert file.status_code == 200
        assert file.headers["content-type"].startswith("text/css" if name.endswith("css") else "text/javascript")
        assert not re.findall(r"innerHTML|https?:|eval\(|document\.write", file.text)
    assert not re.findall(r" (?:style|on[a-z]+)=|<style|<script>", page.text), "the policy lets none of them work"
    for other in ("page/home.html", "page/__init__.py", "page/..%2f__init__.py", "page/none.js"):
        assert client.get(f"/{other}").status_code == 404, other


def test_openapi_describes_how_to_send_and_each_refusal(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"].keys() == {"bearer", "header"}
    assert document["security"] == [{}, {"bearer": []}, {"header": []}]
    post = document["paths"]["/predict"]["post"]
    kinds = {f"image/{kind}" for kind in ("jpeg", "png", "webp", "avif")}
    others = {"multipart/form-data", "application/json", "application/octet-stream"}
    assert post["requestBody"]["content"].keys() == kinds | others
    assert post["responses"].keys() == {"200", "400", "401", "403", "408", "413", "415", "422", "429", "503"}


@pytest.fixture
def several(tmp_path: Path) -> ServedModel:
    make_bundle(tmp_path / "several", task="multilabel", seed=1)
    return ServedModel(Predictor.load(tmp_path / "several", threads=1), version="8", entry=4)


def test_predict_of_several_labels_lists_them(client: TestClient, slot: ModelSlot, several: ServedModel) -> None:
    slot.current = several
    images = [make_image(seed) for seed in range(4)]
    expected = several.predictor.predict(images)
    single = client.post("/predict", content=images[0]).json()
    assert list(single) == [
        *[
            "prediction",
            "labels",
            "confidence",
            "abstained",
            "probabilities",
            "timing",
            "model",
            "request_id",
            "client_request_id",
        ]
    ]
    assert single["labels"] == list(expected[0].labels or ())
    files = [("file", (f"{i}.png", data)) for i, data in enumerate(images)]
    results = client.post("/predict", files=files).json()["results"]
    assert [r["labels"] for r in results] == [list(e.labels or ()) for e in expected]
    assert [r["prediction"] for r in results] == ["|".join(r["labels"]) for r in results]
    assert len({len(r["labels"]) for r in results}) > 1, "sets of several sizes"
    model = client.get("/model").json()
    assert (model["task"], model["threshold"]) == ("multilabel", None)
    assert model["thresholds"] == {"a": 0.5, "b": 0.5, "c": 0.5}


def test_answers_follow_a_swap_between_tasks(client: TestClient, slot: ModelSlot, several: ServedModel) -> None:
    single, data = slot.current, make_image(1)
    assert "labels" not in client.post("/predict", content=data).json()
    slot.current = several
    assert "labels" in client.post("/predict", content=data).json()
    slot.current = single
    assert "labels" not in client.post("/predict", content=data).json()


def test_images_are_counted_under_each_of_their_labels(
    client: TestClient, slot: ModelSlot, several: ServedModel
) -> None:
    slot.current = several
    images = [make_image(seed) for seed in range(30)]
    expected = several.predictor.predict(images)
    for data in images:
        client.post("/predict", content=data)
    figures = read_figures(client)
    counts = {k: v for k, v in figures.items() if k.startswith("visionloop_predicted_images_total")}
    names = [name for e in expected for name in (e.labels or ("(none)",))]
    assert "(none)" in names
    assert counts == {f"visionloop_predicted_images_total{{{n}}}": names.count(n) for n in set(names)}


def test_the_schema_tells_of_labels(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["PredictLabelsAnswer"]["properties"]["labels"]["items"] == {"type": "string"}
    assert "labels" in schemas["PredictLabelsAnswer"]["required"]
    assert "labels" not in schemas["PredictAnswer"]["properties"]
