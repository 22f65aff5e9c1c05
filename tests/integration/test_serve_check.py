"""`visionloop serve --check`: the real server in a process of its own is asked about golden images, or says why not."""

import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fakes import make_bundle, make_image
from shapes import visionloop, visionloop_here
from visionloop.bundle import load_bundle, seal_bundle, upload_bundle
from visionloop.errors import ServingError
from visionloop.serving.check import check_serving
from visionloop.serving.keys import add_key
from visionloop.store import LocalStore
from visionloop.workspace import open_workspace

# What other extras bring: whoever installs `visionloop[serve]` alone has none of it.
OTHERS = ("torch", "torchvision", "mlflow", "prefect", "dvc", "httpx", "joblib", "sklearn", "matplotlib", "pandas")
HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OTHERS!r}:
            raise ModuleNotFoundError("hidden: " + name, name=name)
sys.meta_path.insert(0, Hidden())
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "ws"
    home.mkdir()
    (home / "params.yaml").write_text("name: fake\n")
    make_bundle(home / "candidate")
    return home


def change_answers(folder: Path, shift: float) -> None:
    path = folder / "golden" / "answers.json"
    answers = json.loads(path.read_text())
    path.write_text(json.dumps({**answers, "logits": (np.array(answers["logits"]) + shift).tolist()}))
    seal_bundle(folder)


def test_a_folder_and_a_digest_are_tried_with_the_serve_extra_alone(home: Path) -> None:
    (home / "hidden").mkdir()
    (home / "hidden" / "sitecustomize.py").write_text(HIDE)
    bundle = load_bundle(home / "candidate")
    upload_bundle(LocalStore(home / ".visionloop" / "store"), bundle)
    for address in ("candidate", bundle.digest, bundle.digest[:12]):
        done = visionloop(home, "serve", "--check", address, PYTHONPATH=str(home / "hidden"))
        assert (done.returncode, done.stderr) == (0, ""), address
        told, after = done.stdout.splitlines()
        assert told == f"the server answers 4 golden images of {address} as the bundle does"
        assert after == "next: `visionloop register`, then `visionloop promote`"


def test_keys_a_rate_and_a_port_that_is_taken_do_not_hinder_a_check(home: Path) -> None:
    add_key(home / ".visionloop" / "keys.json", name="a", roles=["predict"], now="2026-11-28", by="t")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (home / "params.yaml").write_text(f"name: fake\nserve:\n  rate_per_s: 0.1\n  admin_port: {port}\n")
        done = visionloop(home, "serve", "--check", "candidate")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nothing", "model 'nothing': does not exist; expected a bundle's folder"),
        ("0" * 12, "model '000000000000': no such bundle is registered in file://"),
        ("candidate/golden", "golden: no digests.json; expected a model bundle."),
    ],
)
def test_what_is_no_bundle_is_one_line(home: Path, address: str, said: str) -> None:
    done = visionloop_here(home, "serve", "--check", address)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def test_wrong_golden_answers_refuse_before_anything_listens(home: Path) -> None:
    change_answers(home / "candidate", 0.5)
    done = visionloop_here(home, "serve", "--check", "candidate")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "golden answers differ by 0.3" in done.stderr


SABOTAGE = """
import visionloop.predictor as p
if "--port" in __import__("sys").argv:
    {code}
"""
SABOTAGES = {
    "it cannot start": (
        "import os; print('no such symbol in libfoo', flush=True); os._exit(1)",
        r"did not start \(no such symbol in libfoo\)",
    ),
    "it answers otherwise": (
        "probs = p.compute_probs; p.compute_probs = lambda logits, card: probs(-logits, card)",
        r"answers golden image 0 with '.', a probability 0\.\d+ off; expected '.', as the bundle does\. See",
    ),
    "it fails inside": ("p.Predictor.answer = None", r"golden image 0 is refused: server: an unexpected error"),
    "it ends in the middle": (
        "import os; p.Predictor.answer = lambda *a: os._exit(3)",
        r"did not answer \(.*\); expected an answer in time",
    ),
}


@pytest.mark.parametrize(("code", "said"), SABOTAGES.values(), ids=SABOTAGES)
def test_a_server_that_fails_refuses_with_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    """The server's process has another library than this one: as in its own container."""
    (home / "broken").mkdir()
    (home / "broken" / "sitecustomize.py").write_text(SABOTAGE.format(code=code))
    monkeypatch.setenv("PYTHONPATH", str(home / "broken"))
    with pytest.raises(ServingError, match=rf"server, tried before it is needed: {said}") as caught:
        check_serving(open_here(home, monkeypatch), str(home / "candidate"))
    assert "\n" not in str(caught.value)


def test_a_server_that_hangs_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "broken").mkdir()
    code = "import time; time.sleep(600)"
    (home / "broken" / "sitecustomize.py").write_text(SABOTAGE.format(code=code))
    monkeypatch.setenv("PYTHONPATH", str(home / "broken"))
    started = time.monotonic()
    with pytest.raises(ServingError, match=r"did not start within 3 s \(it said nothing\)"):
        check_serving(open_here(home, monkeypatch), str(home / "candidate"), limit_s=3)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("limit", "answered"), [(1024, 3), (2048, 4)])
def test_an_image_above_the_limits_is_left_out_if_there_are_others(
    home: Path, monkeypatch: pytest.MonkeyPatch, limit: int, answered: int
) -> None:
    (home / "params.yaml").write_text(f"name: fake\nserve: {{max_pixels: {limit}}}\n")
    folder = home / "candidate"
    (folder / "golden" / "0.png").write_bytes(make_image(0, size_hw=(32, 40)))
    answer_again(folder)
    assert check_serving(open_here(home, monkeypatch), str(folder)) == answered


def test_limits_that_no_golden_image_passes_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "params.yaml").write_text("name: fake\nserve: {max_pixels: 1024}\n")
    folder = home / "candidate"
    for number in range(4):
        (folder / "golden" / f"{number}.png").write_bytes(make_image(number, size_hw=(64, 64)))
    answer_again(folder)
    with pytest.raises(ServingError, match=r"golden image 3 is refused: .*Raise the limits in the section `serve`"):
        check_serving(open_here(home, monkeypatch), str(folder))


def answer_again(folder: Path) -> None:
    """Write the golden answers of the images that are there now."""
    from visionloop.predictor import Predictor

    seal_bundle(folder)
    predictor = Predictor(load_bundle(folder), threads=1)
    logits = predictor.run(predictor.decode_golden(predictor.bundle.golden_images())).logits_nk
    path = folder / "golden" / "answers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "logits": logits.tolist()}))
    seal_bundle(folder)


def open_here(home: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Open a workspace; what that sets in the environment ends with the test."""
    for name in list(os.environ):
        if name.startswith("VISIONLOOP_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert sys.executable
    return open_workspace(home)
