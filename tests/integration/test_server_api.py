"""What clients of every habit send to the server, over a real socket, and the document that describes it."""

import base64
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from fakes import make_bundle, make_image
from model_server import TIMEOUT_S, Server, serving
from visionloop.predictor import Predictor

WITHOUT_EXTRAS = "import sys; sys.modules['pi_heif'] = None; import PIL.AvifImagePlugin as a, PIL.features as f\n"
WITHOUT_EXTRAS += "a.SUPPORTED = False; f.check = lambda name: False"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "bundle"
    make_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle.parent, bundle, first=WITHOUT_EXTRAS, max_queue=8) as server:
        yield server


def send(
    server: Server, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request(method, path, body or None, headers)
    response = connection.getresponse()
    answer = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return answer


def encode(seed: int) -> str:
    return base64.b64encode(make_image(seed)).decode()


def ask_json(server: Server, value: Any) -> Any:
    return server.ask(json.dumps(value).encode(), **{"Content-Type": "application/json"})


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/docs", "/model", "/metrics", "/openapi.json"])
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    with server.connect() as sock:
        sock.sendall(f"HEAD {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n".encode())
        raw = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = raw.partition(b"\r\n\r\n")
    assert (head.split(b"\r\n")[0], body) == (b"HTTP/1.1 200 OK", b"")
    assert f"content-length: {len(send(server, 'GET', path)[2])}".encode() in head or path == "/metrics"


def test_head_of_predict_is_refused(server: Server) -> None:
    assert send(server, "HEAD", "/predict")[0] == 405


@pytest.mark.parametrize("path", ["/predict/", "/predict//", "/predict/?top_k=1"])
def test_a_slash_at_the_end_is_answered_without_a_redirect(server: Server, path: str) -> None:
    answer = server.ask(make_image(1), path)
    assert (answer.status, answer.body["prediction"]) == (200, server.ask(make_image(1)).body["prediction"])


def test_base64_in_json_is_answered_as_the_bytes(server: Server) -> None:
    expected = server.ask(make_image(1)).body["probabilities"]
    text = encode(1)
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for one in (
        text,
        lines,
        text.rstrip("="),
        text.translate(str.maketrans("+/", "-_")),
        "data:image/png;base64," + text,
    ):
        assert ask_json(server, {"image": one}).body["probabilities"] == expected
    untyped = server.ask(b" \n" + json.dumps({"image": text}).encode())  # curl -d says it is a form
    assert untyped.body["probabilities"] == expected


def test_a_list_of_base64_is_answered_by_a_list(server: Server) -> None:
    answer = ask_json(server, {"images": [encode(1), "aGVsbG8=", encode(2)]}).body["results"]
    assert answer[0]["probabilities"] == server.ask(make_image(1)).body["probabilities"]
    assert answer[1]["error"]["code"] == "not_an_image"
    assert answer[2]["probabilities"] == server.ask(make_image(2)).body["probabilities"]
    assert len(ask_json(server, {"images": [encode(1)]}).body["results"]) == 1


@pytest.mark.parametrize(
    ("value", "status", "code", "words"),
    [
        ({"image": "a*b"}, 400, "bad_json", "its `image` is no base64"),
        ({"image": "a"}, 400, "bad_json", "its `image` is no base64"),
        ({"image": 7}, 400, "bad_json", "its `image` is no text"),
        ({"image": ""}, 400, "empty", "is empty"),
        ({"images": "x"}, 400, "bad_json", "its `images` are no list"),
        ({"images": []}, 400, "empty", "its list of images is empty"),
        ({"images": [""] * 9}, 413, "too_many_files", "its JSON has 9 images; expected at most 8"),
        ({"img": "x", "top_k": 3}, 400, "bad_json", 'the keys img, top_k; expected {"image": '),
        ({"image": "é" * 5}, 400, "bad_json", "no base64"),
        ([1], 400, "bad_json", "its JSON has no object"),
    ],
)
def test_wrong_json_is_told_what_is_wrong(server: Server, value: Any, status: int, code: str, words: str) -> None:
    answer = ask_json(server, value)
    assert (answer.status, answer.body["error"]["code"]) == (status, code)
    assert words in answer.body["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"{", b"{\xff}", b'{"image": ' + b"[" * 100_000, b'{"image": ' + b"1" * 10_000 + b"}"]
)
def test_hostile_json_is_a_400(server: Server, body: bytes) -> None:
    answer = server.ask(body)
    assert (answer.status, answer.body["error"]["code"]) == (400, "bad_json")


@pytest.mark.parametrize("kind", ["multipart/form-data", "image/png", ""])
def test_a_form_without_its_boundary_is_told_so(server: Server, kind: str) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + make_image(0) + b"\r\n--x--"
    )
    answer = server.ask(body, **({"Content-Type": kind} if kind else {}))
    assert (answer.status, answer.body["error"]["code"]) == (400, "bad_form")
    assert "Do not set the Content-Type yourself" in answer.body["error"]["message"]


def test_top_k_and_embedding_answer_what_the_predictor_gives(server: Server, bundle: Path) -> None:
    predictor = Predictor.load(bundle, threads=1)
    outputs = predictor.run(predictor.decode(make_image(3), "image")[np.newaxis])
    [prediction] = predictor.answer(outputs)
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    body = server.ask(make_image(3), "/predict?top_k=2&embedding=true").body
    assert list(body["probabilities"].items()) == [(name, pytest.approx(p)) for name, p in ranked[:2]]
    assert body["embedding"] == pytest.approx(outputs.embedding_nd[0].tolist(), abs=1e-5)
    assert len(server.ask(make_image(3), "/predict?top_k=99").body["probabilities"]) == 3
    assert "embedding" not in server.ask(make_image(3)).body


@pytest.mark.parametrize("query", ["top_k=0", "top_k=x", "top_k=-1", "embedding=maybe", "top_k=" + "9" * 5000])
def test_an_option_of_no_such_value_is_refused(server: Server, query: str) -> None:
    answer = server.ask(make_image(0), f"/predict?{query}")
    assert (answer.status, answer.body["error"]["code"]) == (422, "bad_option")
    assert answer.body["error"]["message"].startswith(f"request: query {query.partition('=')[0]}: ")


def test_two_requests_with_one_id_of_the_client_have_two_of_the_server(server: Server) -> None:
    answers = [server.ask(make_image(0), **{"X-Request-ID": "mine"}) for _ in range(2)]
    assert [answer.body["client_request_id"] for answer in answers] == ["mine", "mine"]
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine", "mine"]
    assert len({answer.body["request_id"] for answer in answers} | {"mine"}) == 3


@pytest.mark.parametrize(
    ("brand", "words"),
    [(b"heic", "the extra `heic`"), (b"avif", "is AVIF, and this Pillow is built without")],
)
def test_a_picture_of_a_phone_names_what_is_missing(server: Server, brand: bytes, words: str) -> None:
    answer = server.ask(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"mif1" + b"\0" * 100)
    assert (answer.status, answer.body["error"]["code"]) == (415, "not_an_image")
    assert words in answer.body["error"]["message"]


def test_the_document_is_valid_and_says_what_is_answered(server: Server) -> None:
    document = server.ask(path="/openapi.json").body
    assert document["openapi"].startswith("3.1")
    schemas = document["components"]["schemas"]
    size = schemas["ModelAnswer"]["properties"]["image_size"]
    assert (size["items"], size["minItems"], size["maxItems"]) == ({"type": "integer"}, 2, 2)
    content = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert not [kind for kind in content if "*" in kind]
    form = content["multipart/form-data"]["schema"]
    assert (form["required"], form["properties"]["file"]["minItems"]) == (["file"], 1)
    for schema in (*schemas.values(), *(one["schema"] for one in content.values())):
        jsonschema.Draft202012Validator.check_schema(schema)
    names = {p["name"] for p in document["paths"]["/predict"]["post"]["parameters"]}
    assert names == {"top_k", "embedding", "x-deadline-ms"}

    def check(value: Any, name: str) -> None:
        root = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(root).validate(value)

    check(server.ask(path="/model").body, "ModelAnswer")
    check(server.ask(path="/health/ready").body, "ReadyAnswer")
    check(server.ask(make_image(0), "/predict?embedding=1&top_k=1").body, "PredictAnswer")
    check(ask_json(server, {"images": [encode(0), ""]}).body, "BatchAnswer")
    check(server.ask(b"text").body, "ErrorAnswer")
    refused = document["paths"]["/predict"]["post"]["responses"]["415"]["content"]
    assert refused.keys() == {"application/problem+json"}


def test_an_error_is_a_problem_by_the_standard(server: Server) -> None:
    answer = server.ask(b"text", **{"X-Request-ID": "mine"})
    message = answer.body["error"]["message"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.body == {
        "type": "about:blank",
        "title": "Unsupported Media Type",
        "status": 415,
        "detail": message,
        "code": "not_an_image",
        "error": {"code": "not_an_image", "message": message},
        "request_id": answer.body["request_id"],
        "client_request_id": "mine",
    }
    assert server.ask(path="/nope").body["code"] == "not_found"
