"""What README.md promises, in a fresh clone of this repository: its own commands, in its own order."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from shapes import ROOT, make_environment, retrain, run, visionloop, write_shapes

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = f"{sys.executable} flows/retrain.py"


@dataclass(frozen=True)
class Demo:
    """A clone in which `make demo` has run, and what it printed."""

    home: Path
    output: str


def list_blocks(fence: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
    return [text for language, text in blocks if language == fence]


def clone(target: Path) -> Path:
    """Copy what git would clone, uncommitted changes included, and make it a git repository."""
    listed = run(ROOT, "git", "ls-files", "-co", "--exclude-standard").stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and name not in {"data/dataset.json", "dvc.lock"}:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    for command in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-qm", "clone")):
        assert run(target, "git", *command).returncode == 0
    return target


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The main job on the digits, with an empty home directory."""
    home = clone(tmp_path_factory.mktemp("clone") / "visionloop")
    empty = tmp_path_factory.mktemp("home")
    assert "make demo\n" in list_blocks("bash"), "the first command of README.md"
    recipe = run(ROOT, "make", "-n", "demo").stdout
    assert "flows/retrain.py" in recipe
    done = run(home, *DEMO.split(), HOME=str(empty))
    assert done.returncode == 0, done.stderr
    assert list(empty.iterdir()) == [], "nothing outside the workspace"
    return Demo(home, done.stdout)


def test_demo_ends_with_a_champion_that_answers(demo: Demo) -> None:
    metrics = json.loads((demo.home / "reports" / "metrics.json").read_text())
    assert metrics["accuracy"]["value"] >= 0.97
    assert metrics["accuracy"]["low"] < metrics["accuracy"]["value"] < metrics["accuracy"]["high"]
    for step in ("ingest", "prepare", "train", "evaluate", "gate", "register", "promote", "ask"):
        assert re.search(rf"^\[\d/8\] {step}:", demo.output, flags=re.M), step
    assert len(re.findall(r"^ asked: a \d +\d \(\d", demo.output, flags=re.M)) == 3
    assert re.search(r"gate: first +pass: no champion yet", demo.output)
    assert re.search(r"model +version 1, bundle [0-9a-f]{12}", demo.output)


def test_git_shows_at_most_the_pin_and_the_lock(demo: Demo) -> None:
    status = run(demo.home, "git", "status", "--porcelain", "--untracked-files=all").stdout.splitlines()
    assert {line[3:] for line in status} <= {"data/dataset.json", "dvc.lock"}


def test_dvc_says_up_to_date_and_shows_the_metrics(demo: Demo) -> None:
    said = run(demo.home, "dvc", "repro", DVC_NO_ANALYTICS="1").stdout
    assert "Data and pipelines are up to date." in said
    assert "accuracy.value" in run(demo.home, "dvc", "metrics", "show", DVC_NO_ANALYTICS="1").stdout


def test_the_commands_after_the_demo(demo: Demo) -> None:
    (block,) = [b for b in list_blocks("bash") if "visionloop history" in b]
    commands = [line for line in block.splitlines() if not line.startswith(". .venv")]
    done = run(demo.home, "bash", "-ec", "\n".join(commands))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\* +1 .* promote +bundle [0-9a-f]{12} +model 1", done.stdout, flags=re.M)
    assert re.search(r"^\* +1 +[0-9a-f]{12} .* 1,797 images", done.stdout, flags=re.M)


def test_mlflow_shows_run_version_and_alias(demo: Demo) -> None:
    code = (
        "import sys; from mlflow import MlflowClient; c = MlflowClient(sys.argv[1], sys.argv[1])\n"
        "v = c.get_model_version_by_alias('digits', 'champion'); r = c.get_run(v.run_id)\n"
        "print(v.version, r.info.status, round(r.data.metrics['test/accuracy'], 4))"
    )
    uri = f"sqlite:///{demo.home}/.visionloop/mlflow/mlflow.db"
    said = run(demo.home, sys.executable, "-c", code, uri, MLFLOW_DISABLE_TELEMETRY="true").stdout
    metrics = json.loads((demo.home / "reports" / "metrics.json").read_text())
    assert said.split() == ["1", "FINISHED", str(round(metrics["accuracy"]["value"], 4))]


def test_doctor_is_content(demo: Demo) -> None:
    done = visionloop(demo.home, "doctor")
    assert (done.returncode, done.stdout.count("LOOK")) == (0, 0), done.stdout
    assert "ledger entry 1: model version 1; MLflow's alias: 1" in done.stdout


def test_run_again_says_nothing_changed_and_moves_nothing(demo: Demo) -> None:
    before = {p: p.stat().st_mtime_ns for p in (demo.home / ".visionloop" / "store").rglob("*") if p.is_file()}
    done = run(demo.home, *DEMO.split())
    assert done.returncode == 0
    assert "\nnothing changed: dataset 1, params, code\n" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (demo.home / ".visionloop" / "store").rglob("*") if p.is_file()}


def test_only_what_depends_on_a_changed_parameter_runs(demo: Demo) -> None:
    path = demo.home / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("resamples: 2000", "resamples: 1000"))
    done = run(demo.home, *DEMO.split())
    path.write_text(before)
    for stage in ("prepare", "train"):
        assert re.search(rf"\] {stage}: dvc stage\n  nothing it depends on changed\n", done.stdout), stage
    assert re.search(r"\] evaluate: dvc stage\n  accuracy ", done.stdout)
    assert done.returncode == 3, "the same model as the champion is not better than it"
    assert done.stderr.startswith("not promoted: gate: the candidate is inconclusive")


@pytest.fixture
def server(demo: Demo) -> Iterator[str]:
    """`visionloop serve` on a free port, as README.md has it."""
    command = [sys.executable, "-m", "visionloop", "serve", "--port", "0"]
    env = make_environment()
    process = subprocess.Popen(command, cwd=demo.home, env=env, stdout=subprocess.PIPE, text=True)
    alarm = threading.Timer(60, process.kill)
    alarm.start()
    assert process.stdout is not None
    line = process.stdout.readline()
    alarm.cancel()
    yield line.split(" on ")[1].split()[0]
    process.terminate()
    assert process.wait(timeout=20) == 0


def test_the_server_answers_curl(demo: Demo, server: str) -> None:
    photo = next((demo.home / ".visionloop" / "sources" / "digits" / "7").glob("*.png"))
    shutil.copy(photo, demo.home / "photo.jpg")
    calls = [line for block in list_blocks("") for line in block.splitlines() if line.startswith("curl")]
    assert len(calls) == 2
    for call in calls:
        done = run(demo.home, "bash", "-c", call.replace("http://127.0.0.1:8000", server) + " -sS --fail")
        answer = json.loads(done.stdout)
        assert answer["prediction"] == "7"
        assert answer["model"]["version"] == "1"
        assert set(answer["probabilities"]) == set("0123456789")
    (demo.home / "photo.jpg").unlink()


def test_a_port_in_use(demo: Demo, server: str) -> None:
    done = visionloop(demo.home, "serve", "--port", server.rsplit(":", 1)[1])
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_own_images_train_in_a_workspace_of_their_own(tmp_path: Path, prefect_api: str) -> None:
    """The commands of "Your own images", with a smaller network and fewer epochs."""
    (block,) = [b for b in list_blocks("") if b.startswith("visionloop new DIR")]
    write_shapes(tmp_path / "photos")
    script = (
        block.replace("CLONE", str(ROOT)).replace("DIR", str(tmp_path / "ws")).replace("PATH", str(tmp_path / "photos"))
    )
    *first, last = script.strip().splitlines()
    done = run(tmp_path, "bash", "-ec", "\n".join(first))
    assert done.returncode == 0, done.stderr
    path = tmp_path / "ws" / "params.yaml"
    text = path.read_text().replace("resnet18 #", "small_cnn #").replace("image_size: 224", "image_size: 32")
    path.write_text(text.replace("max_epochs: 20", "max_epochs: 4").replace("accuracy: 0.6", "accuracy: 0.3"))
    done = run(tmp_path, "bash", "-ec", last, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert "horses-or-humans has a new champion" in done.stdout
    card = json.loads((tmp_path / "ws" / "models" / "candidate" / "card.json").read_text())
    assert (card["task"], card["classes"]) == ("binary", ["disc", "ring"])
    assert_more_images_and_rollback(tmp_path / "ws", write_shapes(tmp_path / "more", 20, seed=1), prefect_api)


def assert_more_images_and_rollback(home: Path, more: Path, prefect_api: str) -> None:
    """New images are version 2; a second champion by a lower bar; and back to the first in one command."""
    assert "version 2: 40 new images, 160 in all" in visionloop(home, "ingest", str(more)).stdout
    path = home / "params.yaml"
    path.write_text(path.read_text().replace("rule: better", "rule: no_worse\n  margin: 0.9"))
    done = retrain(home, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert re.search(r"gate: no_worse +pass: ", done.stdout), done.stdout
    first, second = (json.loads(p.read_text()) for p in sorted((home / ".visionloop/store/ledger").rglob("*.json")))
    assert (second["previous"], second["dataset"]["version"]) == (first["bundle"], 2)
    done = visionloop(home, "rollback", "--why", "a test")
    assert done.returncode == 0, done.stderr
    assert f"is bundle {first['bundle'][:12]} again" in done.stdout
    assert "a test" in visionloop(home, "history").stdout.splitlines()[0]
