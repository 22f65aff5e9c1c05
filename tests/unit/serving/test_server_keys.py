"""Keys of the server: made once, stored hashed, revoked at once; and what a file of them that is damaged does."""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from fakes import make_image, run_here
from visionloop.errors import DiskError, SettingsError
from visionloop.predictor import Predictor
from visionloop.serving.access import Access
from visionloop.serving.app import make_app
from visionloop.serving.keys import Keys, add_key, read_keys, revoke_key
from visionloop.serving.swap import ModelSlot, ServedModel

NOW = "2026-11-28T00:00:00+00:00"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def make(path: Path, name: str, *roles: str, rate: float | None = None) -> str:
    return add_key(path, name=name, roles=roles or ("predict",), rate_per_s=rate, now=NOW, by="ada")


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> ModelSlot:
    from fakes import make_bundle

    folder = tmp_path_factory.mktemp("keys") / "bundle"
    make_bundle(folder)
    return ModelSlot(ServedModel(Predictor.load(folder, threads=1)))


@pytest.fixture
def client(slot: ModelSlot, path: Path) -> Iterator[TestClient]:
    make(path, "camera-3")
    with TestClient(make_app(slot, access=Access(Keys(path)))) as client:
        yield client


def ask(client: TestClient, **headers: str) -> Any:
    encoded = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    return client.post("/predict", content=make_image(1), headers=encoded)


def test_a_key_has_256_random_bits_and_its_file_only_a_hash(path: Path) -> None:
    texts = [make(path, name) for name in ("a", "b")]
    assert all(re.fullmatch(r"vlk_[ab]_[A-Za-z0-9_-]{43}", text) for text in texts)
    assert texts[0][6:] != texts[1][6:]
    assert not any(text[6:] in path.read_text() for text in texts)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [(key.name, key.roles, key.made_by) for key in read_keys(path)] == [
        ("a", ("predict",), "ada"),
        ("b", ("predict",), "ada"),
    ]


def test_a_name_is_of_one_valid_key_and_free_again_once_that_is_revoked(path: Path) -> None:
    old = make(path, "desk")
    with pytest.raises(SettingsError, match=r"key desk; expected a new name\. See `visionloop keys list`"):
        make(path, "desk")
    revoke_key(path, "desk", now=NOW)
    new, keys = make(path, "desk"), Keys(path)
    assert keys.find(old) is None
    found = keys.find(new)
    assert found and found.name == "desk"
    with pytest.raises(SettingsError, match="'nobody' is not valid; expected one of desk"):
        revoke_key(path, "nobody", now=NOW)


@pytest.mark.parametrize(("name", "roles", "rate"), [("A b", ["predict"], 1), ("a", ["root"], 1), ("a", ["admin"], 0)])
def test_a_key_that_cannot_be_made_leaves_no_file(path: Path, name: str, roles: list[str], rate: float) -> None:
    with pytest.raises(SettingsError):
        add_key(path, name=name, roles=roles, rate_per_s=rate, now=NOW, by="ada")
    assert not path.exists()


def test_a_request_needs_a_key_in_one_of_two_headers(client: TestClient, path: Path) -> None:
    text = make(path, "second")
    assert ask(client, Authorization=f"Bearer {text}").status_code == 200
    assert ask(client, X_API_Key=text).status_code == 200
    refused = ask(client)
    assert (refused.status_code, refused.json()["code"]) == (401, "no_valid_key")
    assert refused.headers["www-authenticate"] == 'Bearer realm="visionloop"'
    assert refused.headers["content-type"] == "application/problem+json"
    for bad in (f"Bearer {text}x", f"Bearer {text[:-1]}", "Bearer", f"Basic {text}", "Bearer \xff", ""):
        assert ask(client, Authorization=bad).status_code == 401, bad
    assert ask(client, Authorization=f"Bearer {text}", X_API_Key="other").status_code == 401
    assert client.get("/health/ready").status_code == 200
    assert client.get("/model").status_code == client.get("/metrics").status_code == 401


def test_a_key_in_the_address_is_refused_and_told_to_be_revoked(client: TestClient, path: Path) -> None:
    key = make(path, "careless")
    for address in (f"/predict?api_key={key}", f"/predict?api_key={key.replace('_', '%5F')}"):
        for headers in ({}, {"X-API-Key": key}):
            answer = client.post(address, content=make_image(1), headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, "no_valid_key")
            assert "Revoke that key" in answer.json()["detail"]


def test_a_role_that_a_key_lacks_is_403_and_an_admin_may_do_all(client: TestClient, path: Path) -> None:
    desk, admin = make(path, "desk", "feedback"), make(path, "root", "admin")
    refused = ask(client, X_API_Key=desk)
    assert (refused.status_code, refused.json()["code"]) == (403, "not_allowed")
    assert "the key desk has the role feedback; expected a key with the role predict" in refused.json()["detail"]
    assert ask(client, X_API_Key=admin).status_code == 200
    assert client.get("/metrics", headers={"X-API-Key": admin}).status_code == 200


@pytest.mark.parametrize(
    ("path_asked", "roles"),
    [
        ("/predict", "predict admin"),
        ("/similar", "predict admin"),
        ("/feedback", "feedback admin"),
        ("/feedback/", "feedback admin"),
        ("/admin/reload", "admin"),
        ("/admin/what-is-to-come", "admin"),
        ("/what-is-to-come", "predict admin"),
        ("/%61dmin/reload", "admin"),
    ],
)
def test_each_address_has_its_role_also_one_without_a_route(
    client: TestClient, path: Path, path_asked: str, roles: str
) -> None:
    texts = {role: make(path, role, role) for role in ("predict", "feedback", "admin")}
    let_in = []
    for role, text in texts.items():
        status = client.post(path_asked, content=make_image(1), headers={"X-API-Key": text}).status_code
        let_in += [role] if status not in (401, 403) else []
    assert let_in == roles.split()
    assert client.post(path_asked).status_code == 401


def test_a_revoked_key_is_refused_by_the_server_that_runs(client: TestClient, path: Path) -> None:
    text = make(path, "lost")
    assert ask(client, X_API_Key=text).status_code == 200
    revoke_key(path, "lost", now=NOW)
    assert ask(client, X_API_Key=text).status_code == 401


def test_a_server_whose_last_key_is_revoked_is_not_open(client: TestClient, path: Path) -> None:
    revoke_key(path, "camera-3", now=NOW)
    assert ask(client).status_code == 401


DAMAGED = {
    "empty": b"",
    "cut": b'{"keys": [{"na',
    "a list": b"[]",
    "a number": b'{"keys": 3}',
    "no hash": b'{"keys": [{"name": "a", "roles": ["predict"], "sha256": "x"}]}',
    "unknown role": b'{"keys": [{"name": "a", "roles": ["root"], "sha256": "' + b"0" * 64 + b'"}]}',
    "unknown field": b'{"keys": [{"name": "a", "roles": ["admin"], "sha256": "' + b"0" * 64 + b'", "x": 1}]}',
    "a number for a rate": b'{"keys": [{"name": "a", "roles": ["admin"], "sha256": "'
    + b"0" * 64
    + b'", "rate_per_s": "1"}]}',
    "deep": b"[" * 100_000,
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_stops_a_start_and_changes_nothing_for_a_server_that_runs(path: Path, data: bytes) -> None:
    text = make(path, "a")
    keys = Keys(path)
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert keys.find(text) is not None
    assert keys.find("other") is None
    assert keys.problem
    with pytest.raises(SettingsError, match="Restore the file"):
        Keys(path)
    with pytest.raises(SettingsError):
        make(path, "b")
    assert path.read_bytes() == data, "nothing overwrites what a person can still mend"


def test_a_figure_says_that_the_file_is_damaged(client: TestClient, path: Path) -> None:
    root, whole = make(path, "root", "admin"), path.read_bytes()
    problems = []
    for data in (whole, b"{", whole + b"\n"):
        path.write_bytes(data)
        text = client.get("/metrics", headers={"X-API-Key": root}).text
        problems.append(re.findall("^visionloop_keys_problem (.*)$", text, flags=re.M))
    assert problems == [["0.0"], ["1.0"], ["0.0"]]


def test_a_file_that_is_gone_opens_no_server(path: Path) -> None:
    text = make(path, "a")
    keys = Keys(path)
    path.unlink()
    assert not keys.is_open
    assert keys.find(text) is not None
    make(path, "b")
    assert keys.find(text) is None, "the new file counts"


def test_a_file_that_cannot_be_seen_is_not_one_that_was_never_made(path: Path) -> None:
    path.symlink_to(path)  # as a folder that this user may not enter
    with pytest.raises(DiskError, match="cannot be read"):
        Keys(path)


def test_a_file_that_cannot_be_read_for_a_moment_is_read_at_the_next_request(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = make(path, "lost")
    keys = Keys(path)
    revoke_key(path, "lost", now=NOW)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *args, **options: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        assert keys.find(lost) is not None
        assert keys.problem == "cannot be read (Too many open files)"
    assert keys.find(lost) is None
    assert keys.problem is None


def test_the_first_key_closes_a_server_that_runs_open(path: Path) -> None:
    keys = Keys(path)
    assert keys.is_open
    make(path, "a")
    assert not keys.is_open


def test_ten_thousand_keys_are_found_each(path: Path) -> None:
    text = make(path, "last")
    value = json.loads(path.read_text())
    one = value["keys"][0]
    value["keys"] = [{**one, "name": f"k{i}", "sha256": f"{i:064x}"} for i in range(10_000)] + [one]
    path.write_text(json.dumps(value))
    keys = Keys(path)
    assert all(keys.find(text) is not None for _ in range(1000))
    assert keys.find(f"{1:064x}") is None, "a hash is no key"
    path.write_text(json.dumps({"keys": [{**one, "sha256": f"{i:064x}"} for i in range(10_000)]}))
    with pytest.raises(SettingsError, match="two valid keys named last"):
        Keys(path)


def test_the_commands_make_list_and_revoke(
    bundle_dir: Path, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text("name: fake\n")
    monkeypatch.setenv("VISIONLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("VISIONLOOP_KEYS", str(path))
    assert run_here(monkeypatch, "keys", "list") == 0
    assert "no key was made" in capsys.readouterr().out
    assert run_here(monkeypatch, "keys", "new", "--name", "desk", "--role", "feedback", "--role", "predict") == 0
    text = capsys.readouterr().out.strip()
    key = Keys(path).find(text)
    assert key and (key.name, key.roles) == ("desk", ("predict", "feedback"))
    assert run_here(monkeypatch, "keys", "revoke", "desk") == 0
    assert run_here(monkeypatch, "keys", "list") == 0
    shown = capsys.readouterr().out
    assert re.search(r"desk +predict,feedback +made 20.* by .*  revoked 20", shown)
    assert text[9:] not in shown
    assert run_here(monkeypatch, "keys", "new", "--name", "x", "--role", "root") == 2
    assert "--role: got root; expected some of predict, feedback, admin" in capsys.readouterr().err
