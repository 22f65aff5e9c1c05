"""Pretrained weights from files, buckets and the web: loaded bit by bit, or refused in one line."""

import hashlib
import io
import json
import pickle
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from http_server import Answer, WebServer, serve
from s3_server import make_bucket, point_to
from visionloop.errors import ParamsError, TrainingError
from visionloop.networks import fetch
from visionloop.networks.backbones import make_backbone
from visionloop.networks.weights import _fit_positions, hash_weights, load_backbone, load_weights
from visionloop.params import Train, make_params

SIZE = (32, 32)
State = dict[str, torch.Tensor]


def make_network(name: str = "small_cnn", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return make_backbone(name, SIZE)[0]


def to_bytes(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


STATE: State = make_network().state_dict()
DATA = save(STATE)
SHA256 = hashlib.sha256(DATA).hexdigest()


def is_loaded(network: nn.Module) -> bool:
    return all(torch.equal(tensor, STATE[name]) for name, tensor in network.state_dict().items())


def load(home: Path, weights: str, sha256: str | None = None, name: str = "small_cnn") -> nn.Module:
    network = make_network(name, seed=2)
    load_weights(network, name, weights, home, sha256)
    return network


def refuse(home: Path, weights: str, sha256: str | None = None, name: str = "small_cnn") -> str:
    with pytest.raises(TrainingError) as caught:
        load(home, weights, sha256, name)
    assert "\n" not in str(caught.value)
    assert not list((home / ".visionloop").rglob("*.part")) if (home / ".visionloop").exists() else True
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        DATA,
        to_bytes(STATE),
        to_bytes(STATE, _use_new_zipfile_serialization=False),
        to_bytes({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in STATE.items()}}),
        save({f"backbone.{k}": v for k, v in STATE.items()} | {"head.weight": torch.zeros(5, 64)}),
        save({f"module.backbone.{k}": v for k, v in STATE.items()} | {"module.fc.weight": torch.zeros(1)}),
        to_bytes({"model": {k: v for k, v in STATE.items() if "num_batches" not in k}}),
        save({k: v.half() if v.is_floating_point() else v for k, v in STATE.items()}),
    ],
    ids=["safetensors", "zip", "legacy", "parallel", "bundle", "nested", "before-counters", "half"],
)
def test_a_file_is_known_by_its_content_and_its_names_by_their_ends(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(data)
    network = load(tmp_path, "weights.bin")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, STATE[name], atol=2e-3, rtol=2e-3)


def test_old_names_of_densenet_are_understood(tmp_path: Path) -> None:
    state = make_network("densenet121").state_dict()
    old = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for k, v in state.items()}
    assert set(old) != set(state)
    (tmp_path / "old.pth").write_bytes(to_bytes(old))
    network = load(tmp_path, "old.pth", name="densenet121")
    assert all(torch.equal(a, state[name]) for name, a in network.state_dict().items())


def test_positions_of_a_transformer_are_fitted_to_another_size(tmp_path: Path) -> None:
    key = "encoder.pos_embedding"
    of_a_grid = torch.arange(1 + 49, dtype=torch.float32).reshape(1, 50, 1).expand(1, 50, 768).clone()
    with torch.device("meta"):
        wanted = make_backbone("vit_b_32", (64, 64))[0]
    fitted = _fit_positions(wanted, {key: of_a_grid}, wanted.state_dict())[key]
    assert fitted.shape == (1, 5, 768)
    assert fitted[0, 0, 0] == 0, "the class token has no place"
    assert fitted[0, 1, 0] < fitted[0, 2, 0] < fitted[0, 3, 0] < fitted[0, 4, 0]
    assert fitted[0, 1:, 0].mean() == pytest.approx(25)


class Hostile:
    """What a pickle may do when it is opened."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was-here"),))


def make_absurd_header() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (pickle.dumps(Hostile()), "cannot be read as weights"),
        (to_bytes({"a": Hostile()}), "cannot be read as weights (it holds more than tensors, or is damaged)"),
        (to_bytes(STATE)[:5000], "cannot be read as weights ("),
        (DATA[:5000], "cannot be read as weights ("),
        (make_absurd_header(), "cannot be read as weights ("),
        (struct.pack("<Q", 1 << 60) + b'{"', "cannot be read as weights ("),
        (b"<!DOCTYPE html><title>Sign in</title>", "(it begins with '<!DOCTYPE html><')"),
        (b"", "(it begins with 'nothing')"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 60, "cannot be read as weights (it begins with '"),
        (to_bytes([1, 2]), "holds no state dict"),
        (to_bytes({"epoch": 3}), "holds no state dict"),
        (to_bytes({}), "holds no state dict"),
        (save({"x": torch.zeros(2)}), "does not fit small_cnn: 30 tensors missing, 0 of another shape ("),
        (
            save({**STATE, "features.0.weight": torch.zeros(16, 1, 3, 3)}),
            "does not fit small_cnn: 0 tensors missing, 1 of another shape (features.0.weight)",
        ),
        (
            save({**STATE, "features.0.weight": torch.full((16, 3, 3, 3), float("nan"))}),
            "has values that are not finite (features.0.weight)",
        ),
        (
            save({f"{p}.{k}": v.clone() for p in ("teacher", "student") for k, v in STATE.items()}),
            "holds several networks (student., teacher.)",
        ),
    ],
    ids=(
        *("pickle", "inner", "cut-zip", "cut", "header", "length", "html", "empty", "png", "list", "no", "none"),
        *("other", "shape", "nan", "two"),
    ),
)
def test_what_is_no_weights_of_this_network_is_one_line(
    data: bytes, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(data)
    refusal = refuse(tmp_path, "w.pth")
    assert refusal.startswith("params.yaml train.weights: ")
    assert line in refusal
    assert "Set train.weights to a file of a state dict" in refusal
    assert not Path("was-here").exists(), "nothing in the file was run"


def test_a_missing_file_a_folder_and_other_bytes_are_refused(tmp_path: Path) -> None:
    assert "no.pth does not exist; expected none, default or a file." in refuse(tmp_path, "no.pth")
    (tmp_path / "folder").mkdir()
    assert "cannot be read as weights" in refuse(tmp_path, "folder")
    (tmp_path / "w").write_bytes(DATA)
    assert is_loaded(load(tmp_path, "w", SHA256))
    assert f"w has the sha256 {SHA256[:12]}; expected 000000000000." in refuse(tmp_path, "w", "0" * 64)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.web.download.FIRST_WAIT_S", 0.001)


@pytest.fixture
def site() -> Iterator[WebServer]:
    with serve() as server:
        yield server


def test_weights_from_the_web_are_fetched_once(site: WebServer, tmp_path: Path) -> None:
    site.routes["/w"] = Answer(DATA)
    for _ in range(2):
        assert is_loaded(load(tmp_path, f"{site.url}/w?signature=secret", SHA256))
    assert len(site.targets) == 1
    kept = tmp_path / ".visionloop" / "weights" / SHA256
    assert kept.read_bytes() == DATA
    kept.write_bytes(DATA[:-1])
    assert is_loaded(load(tmp_path, f"{site.url}/w", SHA256)), "a damaged copy is fetched anew"
    assert len(site.targets) == 2


def test_a_redirect_is_followed_on_loopback_only(site: WebServer, tmp_path: Path) -> None:
    site.routes["/w"] = Answer(DATA)
    site.routes["/go"] = Answer(status=302, headers={"Location": f"{site.url}/w"})
    assert is_loaded(load(tmp_path, f"{site.url}/go", SHA256))
    site.routes["/out"] = Answer(status=302, headers={"Location": "http://192.0.2.1/w"})
    assert "redirects to 192.0.2.1/w: is not encrypted; expected https://" in refuse(
        tmp_path, f"{site.url}/out", "0" * 64
    )


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (Answer(b"<html>", 404), "/w?...: answered 404; expected"),
        (Answer(b"no", 403), "answered 403"),
        (Answer(DATA, cut=4000), "/w?...: the connection failed ("),
        (Answer(b"<!DOCTYPE html>"), f"has the sha256 {hashlib.sha256(b'<!DOCTYPE html>').hexdigest()[:12]};"),
        (
            Answer(DATA, headers={"Content-Length": str(1 << 40)}, cut=10),
            "too large; expected at most 4,294,967,296",
        ),
        (Answer(status=302, headers={"Location": "/w"}), "redirects more than 5 times"),
    ],
    ids=["404", "403", "cut", "html", "huge", "circle"],
)
def test_what_the_web_may_answer_is_one_line_without_secrets(
    answer: Answer, line: str, site: WebServer, tmp_path: Path
) -> None:
    site.routes["/w"] = answer
    refusal = refuse(tmp_path, f"{site.url}/w?signature=secret", SHA256)
    assert line in refusal
    assert "secret" not in refusal
    assert not list((tmp_path / ".visionloop" / "weights").iterdir())


def test_a_body_that_never_ends_is_cut(site: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 3 << 20)
    site.routes["/w"] = Answer(b"\0" * (5 << 20), headers={"Content-Length": str(5 << 20)})
    assert "is too large" in refuse(tmp_path, f"{site.url}/w", SHA256)


def test_a_silent_server_is_given_up(site: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SILENCE_S", 0.2)
    site.routes["/w"] = lambda handler: time.sleep(0.6)
    assert "/w: gave no whole answer within 0.2 s" in refuse(tmp_path, f"{site.url}/w", SHA256)


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("http://example.com/w", "http://example.com/w: is not encrypted; expected https://"),
        ("http://127.0.0.1.example.com/w", "expected https://"),
        (
            "https://me:secret@example.com/w",
            "https://***@example.com/w: a user name or password in the URL; ex",
        ),
        ("https:///w", "host ''; expected a host name"),
        ("https://169.254.169.254/w", "169.254.169.254 is at a metadata address"),
        ("http://127.0.0.1:9/w", "http://127.0.0.1:9/w: the connection failed ("),
        ("s3://Bad_Bucket/w", "got 's3://Bad_Bucket'"),
    ],
)
def test_addresses_that_are_refused(address: str, line: str, tmp_path: Path) -> None:
    refusal = refuse(tmp_path, address, SHA256)
    assert line in refusal
    assert "secret" not in refusal


def test_weights_from_a_bucket(endpoint_url: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, endpoint_url)
    client.put_object(Bucket=make_bucket(endpoint_url, "zoo"), Key="nets/small (1).bin", Body=DATA)
    assert is_loaded(load(tmp_path, "s3://zoo/nets/small (1).bin", SHA256))
    assert "there is no s3://zoo/nets/no; expected an object" in refuse(tmp_path, "s3://zoo/nets/no", "1" * 64)
    other = refuse(tmp_path, "s3://zoo/nets/small (1).bin", "0" * 64)
    assert f"s3://zoo/nets/small (1).bin has the sha256 {SHA256[:12]}; expected 000000000000." in other
    assert "no-such-bucket" in refuse(tmp_path, "s3://no-such-bucket/w", "2" * 64)
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert is_loaded(load(tmp_path, "s3://zoo/nets/small (1).bin", SHA256)), "the cache needs no network"


def test_our_own_networks_have_no_default_weights(tmp_path: Path) -> None:
    assert "there are no default weights for small_cnn; expected none or a file." in refuse(tmp_path, "default")


def test_a_uri_without_a_digest_is_refused_by_the_parameters() -> None:
    with pytest.raises(ParamsError, match="weights_sha256"):
        make_params({"name": "x", "train": {"weights": "https://example.com/w"}})


def test_the_digest_of_the_start_follows_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(DATA)
    assert hash_weights(Train(weights="w"), tmp_path) == SHA256
    (tmp_path / "w").write_bytes(DATA + b" ")
    assert hash_weights(Train(weights="w"), tmp_path) != SHA256
    assert hash_weights(Train(), tmp_path) == ""
    assert hash_weights(Train(backbone="resnet18", weights="default"), tmp_path) == "resnet18-f37072fd.pth"
    remote = Train(weights="https://example.com/w", weights_sha256=SHA256)
    assert hash_weights(remote, tmp_path) == SHA256


def test_random_weights_follow_the_seed(tmp_path: Path) -> None:
    one, same, other = (
        load_backbone(Train(backbone="small_cnn", seed=seed), SIZE, tmp_path)[0].state_dict()["features.0.weight"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
