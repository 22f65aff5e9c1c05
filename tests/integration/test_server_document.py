"""The OpenAPI document is valid, and true: schemathesis makes requests from it, good and bad ones, and compares."""

from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from fakes import make_bundle
from model_server import Server, serving
from visionloop.predictor import Predictor
from visionloop.serving.app import make_app
from visionloop.serving.swap import ModelSlot, ServedModel

OPERATIONS = (
    *("POST /predict", "POST /similar", "POST /admin/reload", "GET /health/live", "GET /health/ready"),
    *("GET /model", "GET /metrics", "POST /feedback", "GET /images/{sha256}", "POST /explain", "POST /predict/video"),
    *("GET /v2", "GET /v2/health/live", "GET /v2/health/ready"),
    *(f"GET /v2/models/{{name}}{version}{what}" for version in ("", "/versions/{version}") for what in ("", "/ready")),
    *(f"POST /v2/models/{{name}}{version}/infer" for version in ("", "/versions/{version}")),
)
FEW, MANY = 25, 500
# 503 is allowed, and looked for below. That bytes are an image is nothing a schema can say.
EXCLUDED = [not_a_server_error, positive_data_acceptance]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("document") / "bundle"
    make_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle.parent, bundle) as server:
        yield server


def ask_as_described(server: Server, name: str, number: int) -> dict[int, int]:
    """Make requests for one operation, half of them as described and half not; return how often each status came."""
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    operation = schema[name.partition(" ")[2]][name.partition(" ")[0]]
    # In a list of feedback an item that is wrong is answered in its place, with 200 for the others.
    excluded = [*EXCLUDED, *([negative_data_rejection] if name == "POST /feedback" else [])]
    counts: dict[int, int] = {}
    session = requests.Session()
    session.trust_env = False

    def ask(case: Any) -> None:
        response = case.call(session=session)
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
        assert response.status_code < 500 or response.status_code == HTTPStatus.SERVICE_UNAVAILABLE
        case.validate_response(response, excluded_checks=excluded)

    limits: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}
    takes_any = operation.body or operation.query
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 2 if takes_any else 1]:
        strategy = operation.as_strategy(generation_mode=mode)
        settings(max_examples=number // 2, suppress_health_check=list(HealthCheck), **limits)(given(strategy)(ask))()
    return counts


def test_it_is_valid_openapi_3_1_and_every_schema_a_json_schema(bundle: Path) -> None:
    document = make_app(ModelSlot(ServedModel(Predictor.load(bundle, threads=1)))).openapi()
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    described = {f"{verb.upper()} {path}" for path, verbs in document["paths"].items() for verb in verbs}
    assert described == set(OPERATIONS), "all of them are asked below"


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_server_answers_as_described(server: Server, name: str) -> None:
    counts = ask_as_described(server, name, FEW)
    # This server follows no ledger; it gave no answer that one could say something of, and its store is empty. Nor is
    # anything that the test makes up a video.
    others = {"POST /admin/reload": (409,), "POST /feedback": (200, 400), "GET /images/{sha256}": (404,)}
    others |= {"POST /predict/video": (400, 415)}
    expected = (400, 404) if name.startswith("POST /v2") else (404,) if "{name}" in name else others.get(name, (200,))
    assert min(counts) in expected, counts


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name in ("POST /predict", "POST /similar")])
def test_the_server_answers_as_described_many_times(server: Server, name: str) -> None:
    counts = ask_as_described(server, name, MANY)
    assert counts[200] >= MANY // 20, counts
    assert counts[422] >= MANY // 20, counts
