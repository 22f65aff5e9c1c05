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
from typing import Any

import nbformat
import pytest

from notebooks import run_notebook
from shapes import ROOT, make_environment, run, visionloop
from visionloop.data.encoded import name_readable

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
    accuracy = json.loads((demo.home / "reports" / "intervals.json").read_text())["metrics"]["accuracy"]
    assert metrics["accuracy"] == accuracy["value"] >= 0.97
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    for step in ("ingest", "prepare", "train", "evaluate", "gate", "register", "promote", "ask"):
        assert re.search(rf"^\[\d/9\] {step}:", demo.output, flags=re.M), step
    assert len(re.findall(r"^ asked: a \d +\d \(\d", demo.output, flags=re.M)) == 3
    assert len(re.findall(r"no champion yet", demo.output)) == 1, "the gate's rules are told once"
    assert re.search(r"pass +first +no champion yet", demo.output)
    assert re.search(r"champion +version 1, bundle [0-9a-f]{12}", demo.output)


def test_git_shows_at_most_the_pin_and_the_lock(demo: Demo) -> None:
    status = run(demo.home, "git", "status", "--porcelain", "--untracked-files=all").stdout.splitlines()
    assert {line[3:] for line in status} <= {"data/dataset.json", "dvc.lock"}


def test_dvc_says_up_to_date_and_shows_the_metrics(demo: Demo) -> None:
    said = run(demo.home, "dvc", "repro", DVC_NO_ANALYTICS="1").stdout
    assert "Data and pipelines are up to date." in said
    shown = run(demo.home, "dvc", "metrics", "show", DVC_NO_ANALYTICS="1").stdout
    assert {"accuracy", "macro_f1"} <= set(shown.split()) and "value" not in shown, "flat figures"


def test_the_commands_after_the_demo(demo: Demo) -> None:
    (block,) = [b for b in list_blocks("bash") if "visionloop history" in b]
    commands = [line for line in block.splitlines() if not line.startswith(". .venv")]
    done = run(demo.home, "bash", "-ec", "\n".join(commands))
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^\* +1 .* promote +none -> [0-9a-f]{12} +model 1 +dataset 1 +decision 1: passed ", done.stdout, flags=re.M
    )
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
    assert said.split() == ["1", "FINISHED", str(round(metrics["accuracy"], 4))]


def test_doctor_is_content(demo: Demo) -> None:
    done = visionloop(demo.home, "doctor")
    assert (done.returncode, done.stdout.count("LOOK")) == (0, 0), done.stdout
    assert "ledger entry 1: model version 1; MLflow's alias: 1" in done.stdout


def read_times(home: Path) -> dict[Path, int]:
    """When each object of the store was written, but the lease: each retrain takes a new number."""
    store = home / ".visionloop" / "store"
    return {
        p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file() and p.relative_to(store).parts[0] != "leases"
    }


def test_run_again_says_nothing_changed_and_moves_nothing(demo: Demo, prefect_api: str) -> None:
    before = read_times(demo.home)
    done = run(demo.home, *DEMO.split(), PREFECT_API_URL=prefect_api)
    assert done.returncode == 0
    assert "\nnothing changed: dataset 1, params, code\n" in done.stdout
    assert read_times(demo.home) == before


# Long: what a change runs again is in test_flow_errors and test_what_stays, on shapes.
@pytest.mark.long
def test_only_what_depends_on_a_changed_parameter_runs(demo: Demo, prefect_api: str) -> None:
    path = demo.home / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("resamples: 2000", "resamples: 1000"))
    done = run(demo.home, *DEMO.split(), PREFECT_API_URL=prefect_api)
    path.write_text(before)
    for stage in ("prepare", "train"):
        assert re.search(rf"\] {stage}: dvc stage\n  nothing it depends on changed\n", done.stdout), stage
    assert re.search(r"\] evaluate: dvc stage\n  .*\n  accuracy ", done.stdout)
    assert (done.returncode, done.stderr) == (0, ""), "the same model is no refusal"
    assert "the candidate is the champion of digits itself; nothing moved" in done.stdout


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
    assert process.wait(timeout=120) == 0


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


def test_the_tour_runs_after_the_demo_and_is_kept_with_its_outputs(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    places = {"HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")}
    ran = run_notebook(demo.home / "docs" / "tour.ipynb", **make_environment(**places))
    cells = [cell for cell in ran.cells if cell.cell_type == "code"]
    kept = [cell for cell in nbformat.read(ROOT / "docs" / "tour.ipynb", 4).cells if cell.cell_type == "code"]
    assert [describe_outputs(cell) for cell in kept] == [describe_outputs(cell) for cell in cells]
    said = "\n".join(output["text"] for cell in cells for output in cell.outputs if output.output_type == "stream")
    accuracy = re.search(r"^([\d.]+)% of 270 test images are answered rightly$", said, flags=re.M)
    assert accuracy and float(accuracy[1]) >= 97
    assert f"image 2: is text, not an image; expected {name_readable()}. Check where it was downloaded from." in said
    [model] = [text for text in list_texts(cells) if text.startswith("<visionloop.Model")]
    assert re.fullmatch(r"<visionloop.Model digits: .*; dataset version 1; bundle \w{12} from digits@champion>", model)
    pictures = [kind for cell in cells for kind in describe_outputs(cell) if "image/png" in kind]
    assert len(pictures) == 2


def list_texts(cells: list[Any]) -> list[str]:
    outputs = [output for cell in cells for output in cell.outputs]
    return [output["data"]["text/plain"] for output in outputs if "data" in output]


def describe_outputs(cell: Any) -> list[str]:
    """What kinds of output a cell has; none of them is an error or goes to stderr."""
    kinds = [o.get("name") or " ".join(sorted(o.get("data", [o.output_type]))) for o in cell.outputs]
    assert not {"stderr", "error"} & set(kinds), cell.outputs
    return kinds
