"""Who may reach the server: hosts, origins, rates, ports, and the headers and log lines that every request gets."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fakes import make_bundle, make_image
from visionloop.errors import ParamsError
from visionloop.params import make_params
from visionloop.predictor import Predictor
from visionloop.serving.access import LOOPBACK_HOSTS, Access, RateExceeded, Rates
from visionloop.serving.app import make_app
from visionloop.serving.body import Limits
from visionloop.serving.envelope import JsonLines, request_log
from visionloop.serving.keys import Keys, add_key
from visionloop.serving.swap import ModelSlot, ServedModel

NOW = "2026-11-28T00:00:00+00:00"
PAGE = "https://shop.example"


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> ModelSlot:
    folder = tmp_path_factory.mktemp("access") / "bundle"
    make_bundle(folder)
    return ModelSlot(ServedModel(Predictor.load(folder, threads=1), version="7"))


@contextmanager
def asking(slot: ModelSlot, access: Access, base: str = "http://localhost", **options: Any) -> Iterator[TestClient]:
    with TestClient(make_app(slot, access=access, **options), base_url=base) as client:
        yield client


def make_keys(path: Path, name: str, role: str, rate: float | None = None) -> dict[str, str]:
    return {"X-API-Key": add_key(path, name=name, roles=[role], rate_per_s=rate, now=NOW, by="t")}


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "localhost."])
def test_a_loopback_server_answers_to_the_names_of_its_machine(slot: ModelSlot, host: str) -> None:
    with asking(slot, Access(hosts=LOOPBACK_HOSTS)) as client:
        assert client.get("/model", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "127.0.0.1:80:80", "a@localhost", "["])
def test_a_loopback_server_refuses_other_names(slot: ModelSlot, host: str) -> None:
    with asking(slot, Access(hosts=LOOPBACK_HOSTS)) as client:
        answer = client.get("/model", headers={"Host": host})
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_host")
        assert "serve.hosts" in answer.json()["detail"]
        assert client.get("/health/live", headers={"Host": host}).status_code == 200, "probes come by address"


def test_a_host_may_stand_for_all_below_it(slot: ModelSlot) -> None:
    with asking(slot, Access(hosts=("*.shop.example",))) as client:
        status = {h: client.get("/model", headers={"Host": h}).status_code for h in ("a.shop.example", "shop.example")}
    assert status == {"a.shop.example": 200, "shop.example": 400}


def test_two_host_headers_are_refused(slot: ModelSlot) -> None:
    with asking(slot, Access()) as client:
        answer = client.get("/model", headers=[("Host", "localhost"), ("Host", "evil.example")])
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_host")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://["},
        {"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_origin_cannot_ask(slot: ModelSlot, headers: dict[str, str]) -> None:
    with asking(slot, Access()) as client:
        answer = client.post("/predict", content=make_image(1), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "bad_origin")
        assert "access-control-allow-origin" not in client.get("/model", headers=headers).headers


@pytest.mark.parametrize(
    "headers", [{}, {"Origin": "http://localhost"}, {"Origin": "https://public.name", "Sec-Fetch-Site": "same-origin"}]
)
def test_a_page_of_the_server_itself_and_a_program_can_ask(slot: ModelSlot, headers: dict[str, str]) -> None:
    with asking(slot, Access()) as client:
        assert client.post("/predict", content=make_image(1), headers=headers).status_code == 200


def test_a_page_of_an_allowed_origin_can_ask_and_read_also_an_error(slot: ModelSlot, tmp_path: Path) -> None:
    key = make_keys(tmp_path / "k", "a", "predict")
    with asking(slot, Access(Keys(tmp_path / "k"), cors=(PAGE,))) as client:
        ask_first = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        first = client.options("/predict", headers=ask_first)
        assert (first.status_code, first.headers["access-control-allow-origin"]) == (204, PAGE)
        assert "X-API-Key" in first.headers["access-control-allow-headers"]
        for headers, status in ((key, 200), ({}, 401)):
            answer = client.post("/predict", content=make_image(1), headers={"Origin": PAGE, **headers})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
            assert answer.headers["vary"] == "Origin"
        other = client.options("/predict", headers={**ask_first, "Origin": "https://evil.example"})
        assert other.status_code >= 400
        assert "access-control-allow-origin" not in other.headers


def test_every_origin_is_not_the_one_of_a_file(slot: ModelSlot) -> None:
    with asking(slot, Access(cors=("*",))) as client:
        assert client.post("/predict", content=make_image(1), headers={"Origin": "http://a"}).status_code == 200
        assert client.post("/predict", content=make_image(1), headers={"Origin": "null"}).status_code == 403


@pytest.mark.parametrize(
    "value", [{"cors": ["null"]}, {"cors": ["https://a/b"]}, {"hosts": ["a b"]}, {"hosts": ["*a"]}]
)
def test_what_is_no_host_or_origin_is_refused_by_params(value: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=f"serve.{next(iter(value))}"):
        make_params({"name": "x", "serve": value})


def test_a_client_waits_as_long_as_it_is_told_and_no_longer() -> None:
    rates, refused = Rates(), []
    for now_s in (0.0, 0.1):
        rates.take("a", 2.0, now_s)
    with pytest.raises(RateExceeded) as caught:
        rates.take("a", 2.0, 0.2)
    assert caught.value.headers == {"Retry-After": "1"}
    rates.take("b", 2.0, 0.2)
    rates.take("a", 2.0, 1.2)
    rates.charge("a", 4)
    for now_s in (1.3, 3.1):
        with pytest.raises(RateExceeded) as caught:
            rates.take("a", 2.0, now_s)
        refused.append(now_s + int(caught.value.headers["Retry-After"]))
    rates.take("a", 2.0, min(refused))


def test_a_list_may_be_longer_than_what_is_left_and_the_next_one_waits() -> None:
    rates = Rates("items of feedback a minute", 60.0)
    rates.take("a", 60, 0.0, 100)
    with pytest.raises(RateExceeded, match="at most 60 items of feedback a minute") as caught:
        rates.take("a", 60, 30.0)
    assert caught.value.headers == {"Retry-After": "11"}
    rates.take("a", 60, 41.0)


def test_over_a_minute_a_client_gets_its_rate() -> None:
    rates, taken = Rates(), 0
    for tick in range(6000):
        try:
            rates.take("a", 3.0, tick / 100)
            taken += 1
        except RateExceeded:
            pass
    assert 3 * 60 <= taken <= 3 * 60 + 3


def test_a_slow_rate_lets_one_request_in() -> None:
    rates = Rates()
    rates.take("a", 0.01, 0.0)
    with pytest.raises(RateExceeded) as caught:
        rates.take("a", 0.01, 1.0)
    assert caught.value.headers == {"Retry-After": "99"}


def test_many_addresses_take_little_memory() -> None:
    rates = Rates()
    for i in range(10_050):
        rates.take(f"host {i}", 1.0, 0.0)
    assert len(rates._buckets) == 10_000


def test_a_key_above_its_rate_gets_429_and_others_do_not(slot: ModelSlot, tmp_path: Path) -> None:
    slow, fast = make_keys(tmp_path / "k", "slow", "predict", 0.5), make_keys(tmp_path / "k", "fast", "predict")
    with asking(slot, Access(Keys(tmp_path / "k"), rate_per_s=1000)) as client:
        files = [("file", ("a", make_image(i))) for i in range(3)]
        assert client.post("/predict", files=files, headers=slow).status_code == 200
        refused = client.post("/predict", content=make_image(1), headers=slow)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many")
        assert refused.headers["retry-after"] in ("5", "6"), "three images were taken, at one in two seconds"
        assert [client.post("/predict", content=make_image(1), headers=fast).status_code for _ in range(5)] == [200] * 5
        assert client.get("/health/ready").status_code == 200


def test_without_keys_each_address_has_its_rate(slot: ModelSlot) -> None:
    with asking(slot, Access(rate_per_s=1)) as client:
        assert [client.get("/model").status_code for _ in range(2)] == [200, 429]


def test_figures_and_admin_are_on_their_port_alone(slot: ModelSlot, tmp_path: Path) -> None:
    key = make_keys(tmp_path / "k", "a", "predict")
    access = Access(Keys(tmp_path / "k"), admin_port=9000)
    paths = ("/metrics", "/admin/reload", "/model", "/docs", "/predict", "/health/live", "/nothing")
    with asking(slot, access, "http://localhost:8000") as client:
        public = {path: client.get(path, headers=key).status_code for path in paths}
    with asking(slot, access, "http://localhost:9000") as client:
        admin = {path: client.get(path).status_code for path in paths}
    assert public == dict(zip(paths, (404, 404, 200, 200, 405, 200, 404), strict=True))
    assert admin == dict(zip(paths, (200, 401, 404, 404, 404, 200, 404), strict=True))


@pytest.mark.parametrize("admin_port", [None, 9000])
@pytest.mark.parametrize(
    ("reached", "host", "status"),
    [
        ("10.0.0.5", "10.0.0.5:9000", 200),
        ("10.0.0.5", "localhost:9000", 200),
        ("10.0.0.5", "pets.example", 200),
        ("10.0.0.5", "10.0.0.6:9000", 400),
        ("10.0.0.5", "evil.example:9000", 400),
        ("evil.example", "evil.example:9000", 400),  # a name is no address, whoever says that it is the server's
        ("[fd00::5]", "[fd00:0::5]:9000", 200),
        ("[fd00::5]", "[fd00::6]:9000", 400),
    ],
)
def test_prometheus_may_scrape_by_the_address_of_the_server_and_by_no_other(
    slot: ModelSlot, admin_port: int | None, reached: str, host: str, status: int
) -> None:
    with asking(slot, Access(hosts=("pets.example",), admin_port=admin_port), f"http://{reached}:9000") as client:
        assert client.get("/metrics", headers={"Host": host}).status_code == status
        if admin_port is None and status == 200 and host != "pets.example":
            assert client.get("/model", headers={"Host": host}).status_code == 400, "only the figures"


@pytest.mark.parametrize("path", ["/predict", "/model", "/docs", "/health/live", "/nothing"])
def test_every_answer_has_headers_that_make_a_browser_careful(slot: ModelSlot, path: str) -> None:
    with asking(slot, Access()) as client:
        headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The lines that the log gets, as JSON."""
    written: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    handler = Keep()
    handler.setFormatter(JsonLines())
    monkeypatch.setattr(request_log, "handlers", [handler])
    monkeypatch.setattr(request_log, "level", logging.INFO)
    request_log.manager._clear_cache()  # type: ignore[attr-defined]
    yield written
    request_log.manager._clear_cache()  # type: ignore[attr-defined]


def test_a_request_is_one_line_of_json_with_who_asked_and_what_answered(
    slot: ModelSlot, tmp_path: Path, lines: list[str]
) -> None:
    key = make_keys(tmp_path / "k", "camera-3", "predict")
    trace = "0af7651916cd43dd8448eb211c80319c"
    with asking(slot, Access(Keys(tmp_path / "k"))) as client:
        sent = {**key, "X-Request-ID": "mine", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        answer = client.post("/predict", content=make_image(1), headers=sent).json()
        client.get("/health/live")
        client.post("/predict", content=b"no image", headers=key)
    assert len(lines) == 2
    line, refused = map(json.loads, lines)
    assert slot.current
    assert line.pop("duration_ms") > 0
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "message": "request",
        "request_id": answer["request_id"],
        "client_request_id": "mine",
        "trace_id": trace,
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "outcome": "ok",
        "model": {"version": "7", "digest": slot.current.digest},
        "who": "camera-3",
        "client": "testclient",
    }
    assert (refused["status"], refused["outcome"]) == (415, "not_an_image")


def test_nothing_that_a_client_sends_writes_a_line_or_a_key(slot: ModelSlot, tmp_path: Path, lines: list[str]) -> None:
    secret = make_keys(tmp_path / "k", "camera-3", "predict")["X-API-Key"]
    with asking(slot, Access(Keys(tmp_path / "k"))) as client:
        for path in (
            f"/x/{secret}",
            f"/predict?key={secret}",
            "/%0a%7b%22level%22:1%7d",
            "/%1b[2J",
            "/" + "x" * 9000,
            "/é",
        ):
            client.get(path, headers={"User-Agent": secret, "X-Request-ID": secret})
        client.post("/predict", content=make_image(1), headers={"X-API-Key": secret})
    assert len(lines) == 7
    assert all(line.isascii() and "\n" not in line and "\x1b" not in line for line in lines)
    assert not any(secret[13:] in line for line in lines)
    assert max(map(len, lines)) < 1000
    assert json.loads(lines[0])["path"] == "/x/vlk_camera-3_***"


def test_an_exception_stays_one_line() -> None:
    try:
        raise ValueError("a\nb vlk_camera-3_" + "x" * 43)
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, "failed: %s", ("x\ny",), sys.exc_info())
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "failed: x\ny"
    assert "ValueError: a" in json.loads(line)["traceback"]
    assert "xxxx" not in line


def test_on_a_public_address_without_keys_one_may_only_predict(slot: ModelSlot) -> None:
    with asking(slot, Access(is_public=True)) as client:
        assert client.post("/predict", content=make_image(1)).status_code == 200
        refused = client.post("/admin/reload")
    assert (refused.status_code, refused.json()["code"]) == (403, "not_allowed")
    assert "visionloop keys new --role admin" in refused.json()["detail"]


def test_a_large_body_without_a_key_is_told_so(slot: ModelSlot, tmp_path: Path) -> None:
    make_keys(tmp_path / "k", "a", "predict")
    with asking(slot, Access(Keys(tmp_path / "k")), limits=Limits(max_body_bytes=1000)) as client:
        assert client.post("/predict", content=bytes(5_000_000)).status_code == 401
