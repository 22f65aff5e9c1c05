"""Keys, ports and hosts of a server that runs, over real sockets, and what hostile heads do to it."""

import http.client
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fakes import make_bundle, make_image
from model_server import TIMEOUT_S, Server, read_all, serving
from visionloop.errors import ServingError, SettingsError
from visionloop.params import Serve, make_params
from visionloop.serving.access import LOOPBACK_HOSTS
from visionloop.serving.keys import Keys, add_key, revoke_key
from visionloop.serving.main import make_access, run_server
from visionloop.settings import Settings
from visionloop.workspace import connect

NOW = "2026-11-28T00:00:00+00:00"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("access")
    make_bundle(home / "bundle")
    return home


@pytest.fixture(scope="module")
def keys(home: Path) -> dict[str, str]:
    """The texts of the keys by name."""
    path = home / ".visionloop" / "keys.json"
    roles = {"camera": "predict", "lost": "predict", "root": "admin"}
    return {
        name: add_key(path, name=name, roles=[role], rate_per_s=None, now=NOW, by="t") for name, role in roles.items()
    }


@pytest.fixture(scope="module")
def admin_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def server(home: Path, keys: dict[str, str], admin_port: int) -> Iterator[Server]:
    with serving(home, home / "bundle", hosts=None, admin_port=admin_port, log_format="json") as server:
        yield server


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as connection:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


def send_head(server: Server, *lines: str) -> tuple[str, str]:
    """Send a request of these lines; return the status line and the whole answer."""
    with server.connect() as sock:
        sock.sendall("\r\n".join(("GET /model HTTP/1.1", *lines, "Connection: close", "", "")).encode("latin-1"))
        answer = read_all(sock).decode("latin-1")
    return answer.partition("\r\n")[0], answer


def test_a_key_opens_until_it_is_revoked(server: Server, home: Path, keys: dict[str, str]) -> None:
    assert server.ask(make_image(1)).status == 401
    assert server.ask(make_image(1), Authorization=f"Bearer {keys['lost']}").status == 200
    revoke_key(home / ".visionloop" / "keys.json", "lost", now=NOW)
    assert server.ask(make_image(1), Authorization=f"Bearer {keys['lost']}").status == 401
    assert server.ask(make_image(1), Authorization=f"Bearer {keys['camera']}").status == 200


def test_a_client_that_still_sends_its_image_sees_why_it_is_refused(server: Server) -> None:
    answer = server.ask(bytes(15_000_000))
    assert (answer.status, answer.body["code"]) == (401, "no_valid_key")


def test_figures_and_admin_have_a_port_of_their_own(server: Server, keys: dict[str, str], admin_port: int) -> None:
    root = {"X-API-Key": keys["root"]}
    assert get(server.port, "/metrics", **root)[0] == get(server.port, "/admin/reload", "POST", **root)[0] == 404
    status, text = get(admin_port, "/metrics")
    assert (status, "visionloop_requests_total" in text) == (200, True)
    assert get(admin_port, "/admin/reload", "POST")[0] == 401
    assert get(admin_port, "/admin/reload", "POST", **{"X-API-Key": keys["camera"]})[0] == 403
    assert get(admin_port, "/admin/reload", "POST", **root)[0] == 409, "it was started with a bundle"
    assert get(admin_port, "/model", **root)[0] == 404
    assert get(admin_port, "/health/live")[0] == 200


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Host: evil.example"], "400"),
        (["Host: localhost", "Host: evil.example"], "400"),
        (["Host: localhost", "X-API-Key: {key}"], "200"),
        (["Host: localhost", "Authorization: Bearer {key}", "Authorization: Bearer other"], "401"),
        (["Host: localhost", "X-API-Key: {key}", "X-Request-ID: a\r\n\tSet-Cookie: evil=1"], ""),
        (["Host: localhost", "X-API-Key: {key}", "X-Request-ID: a\nSet-Cookie: evil=1"], ""),
        (["Host: localhost", "X-API-Key: {key}", "Origin: a\rSet-Cookie: evil=1"], ""),
        (["Host: localhost", "X-API-Key: {key}", "Authorization: \x00\xff"], ""),
        (["Host: localhost", "X-API-Key: " + "x" * 100_000], ""),
        (["Host: localhost", *(f"X-{i}: y" for i in range(20_000))], ""),
    ],
)
def test_a_hostile_head_gets_no_5xx_and_puts_no_header_into_the_answer(
    server: Server, keys: dict[str, str], lines: list[str], status: str
) -> None:
    try:
        first, answer = send_head(server, *(line.replace("{key}", keys["camera"]) for line in lines))
    except (ConnectionResetError, BrokenPipeError):  # closed while it was still being sent
        first, answer = "HTTP/1.1 431", ""
    assert first.startswith(f"HTTP/1.1 {status}" if status else ("HTTP/1.1 4", "HTTP/1.1 2")), first
    assert "set-cookie" not in answer.lower()
    assert server.ask(make_image(1), **{"X-API-Key": keys["camera"]}).status == 200


def test_the_log_is_lines_of_json_without_a_key(home: Path, keys: dict[str, str]) -> None:
    with serving(home, home / "bundle", log_format="json") as server:
        server.ask(make_image(1), **{"X-API-Key": keys["camera"]})
        server.ask(make_image(1), f"/predict?key={keys['camera']}", **{"X-API-Key": keys["camera"]})
        server.ask(None, f"/%0A{keys['camera']}", **{"X-Request-ID": keys["camera"]})
        _, log = server.stop()
    lines = [json.loads(line) for line in log.splitlines()]
    requests = [line for line in lines if line["message"] == "request"]
    assert [(line["status"], line["who"]) for line in requests] == [(200, "camera"), (401, None), (401, None)]
    assert not any(text in log for text in keys.values())


def make_workspace_args(home: Path) -> Settings:
    return Settings(home=home, store_url=(home / "store").as_uri(), tracking_uri="", artifact_root="")


def test_a_damaged_file_of_keys_is_found_before_anything_listens(home: Path, tmp_path: Path) -> None:
    (tmp_path / ".visionloop").mkdir()
    (tmp_path / ".visionloop" / "keys.json").write_text('{"keys": [')
    workspace = connect(make_workspace_args(tmp_path), make_params({"name": "fake"}))
    with pytest.raises(SettingsError, match="are damaged"):
        run_server(workspace, host="127.0.0.1", port=0, bundle=home / "bundle")


def test_an_admin_port_that_is_taken_is_said(home: Path, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        port = sock.getsockname()[1]
        workspace = connect(make_workspace_args(tmp_path), make_params({"name": "fake", "serve": {"admin_port": port}}))
        with pytest.raises(ServingError, match=f"127.0.0.1:{port}: is in use.*serve.admin_port"):
            run_server(workspace, host="127.0.0.1", port=0, bundle=home / "bundle")


@pytest.mark.parametrize(("host", "is_public"), [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("::", True)])
def test_a_server_that_others_reach_without_keys_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, is_public: bool
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.create_server((host, 0), family=family)) as sock:
        access = make_access(Serve(), Keys(tmp_path / "keys.json"), sock)
        assert (access.is_public, access.hosts) == (is_public, ("*",) if is_public else LOOPBACK_HOSTS)
        assert ("visionloop keys" in caplog.text) == is_public
        caplog.clear()
        add_key(tmp_path / "keys.json", name="a", roles=["admin"], now=NOW, by="t")
        make_access(Serve(), Keys(tmp_path / "keys.json"), sock)
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
