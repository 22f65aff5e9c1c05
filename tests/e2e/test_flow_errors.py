"""Mistakes through the flow: one clear line and exit code 2, whatever Prefect and dvc put around it.

Also what runs again after a change, as it takes the same trained workspace.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fakes import run_here
from shapes import ROOT, find_flow_run, retrain, run, set_compute, visionloop_here


@pytest.fixture
def home(retrained: tuple[Path, str], tmp_path: Path) -> Path:
    shutil.copytree(retrained[0], tmp_path / "ws", symlinks=True)
    return tmp_path / "ws"


def edit(home: Path, old: str, new: str) -> None:
    path = home / "params.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def add_source(home: Path, folder: Path) -> None:
    edit(home, "name: shapes\n", f"name: shapes\ningest: {{sources: [{{kind: folder, path: {folder}}}]}}\n")


def with_missing_path(home: Path) -> None:
    add_source(home, home / "nowhere")


def with_empty_folder(home: Path) -> None:
    (home.parent / "empty").mkdir()
    add_source(home, home.parent / "empty")


def with_unknown_key(home: Path) -> None:
    edit(home, "max_epochs", "epochs")


def with_lost_version(home: Path) -> None:
    shutil.rmtree(home / ".visionloop" / "store" / "datasets")


def with_unknown_backbone(home: Path) -> None:
    edit(home, "small_cnn", "small_cn")


# Found before the flow, in a step of its own, and in a stage of dvc.
IN_THE_FLOW: list[tuple[Callable[[Path], None], str]] = [
    (with_unknown_key, "params.yaml train.epochs: unknown key; expected one of max_epochs,"),
    (with_missing_path, "nowhere: does not exist; expected a folder. Check the path."),
    (with_unknown_backbone, "params.yaml train.backbone: got 'small_cn'; expected a known backbone; near: small_cnn"),
]


@pytest.mark.parametrize(("break_it", "line"), IN_THE_FLOW, ids=[case[0].__name__ for case in IN_THE_FLOW])
def test_a_mistake_is_one_line_and_exit_code_2(
    home: Path, prefect_api: str, break_it: Callable[[Path], None], line: str
) -> None:
    break_it(home)
    done = retrain(home, PREFECT_API_URL=prefect_api)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    assert_one_line(done.stderr, line)


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (with_empty_folder, "no image in any class folder; it holds no file; expected CLASS/IMAGE.jpg."),
        (with_lost_version, "/store: does not hold dataset shapes version 2 ("),
    ],
)
def test_a_mistake_is_the_same_line_without_the_flow(
    home: Path,
    break_it: Callable[[Path], None],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(home)
    monkeypatch.chdir(home)
    assert run_here(monkeypatch, "start") == 2
    assert_one_line(capsys.readouterr().err, line)


def assert_one_line(told: str, line: str) -> None:
    assert told.startswith("error: ")
    assert line in told
    assert told.count("\n") == 1


def test_unreachable_mlflow_in_register(home: Path) -> None:
    """Through the command: the store has the bundle already, MLflow's mirror is what fails."""
    decision = json.loads((home / "decisions" / "latest.json").read_text())
    assert decision["verdict"] == "passed"
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = visionloop_here(home, "register", **away)
    assert done.returncode == 2
    assert done.stderr.startswith("error: MLflow http://127.0.0.1:9: cannot be used")
    assert done.stderr.count("\n") == 1
    said = visionloop_here(home, "register").stdout.splitlines()
    assert said == ["registered as shapes version 1 in MLflow", "next: `visionloop promote`"]


def test_a_candidate_with_a_flipped_byte_is_refused_by_every_command(home: Path) -> None:
    path = home / "models" / "candidate" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # dvc may have linked it to its cache
    path.write_bytes(data)
    for command in ("evaluate", "gate", "register", "promote"):
        done = visionloop_here(home, command)
        assert done.returncode == 2, command
        assert "model.onnx differs from its digest" in done.stderr, command
    assert visionloop_here(home, "serve", "--bundle", "models/candidate", "--port", "0").returncode == 2
    assert len(list((home / ".visionloop" / "store" / "ledger").rglob("*.json"))) == 1


def test_a_text_file_named_jpg_is_quarantined_while_the_run_goes_on(retrained: tuple[Path, str]) -> None:
    _, said = retrained
    assert "quarantined 1 file" in said
    assert re.search(r"not_an_image\s+folder:disc/notes.jpg", said)
    assert "version 2: 40 new images, 120 in all" in said
    assert "shapes has a new champion" in said


def find_changed(home: Path) -> set[str]:
    """The stages that dvc would run."""
    done = run(home, sys.executable, "-m", "dvc", "status", "--json")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_what_changes_no_result_runs_nothing_again(home: Path, prefect_api: str, tmp_path: Path) -> None:
    """A changed error text, TensorBoard, two processes: then other weights under the same name, which do count."""
    shutil.copytree(ROOT / "src" / "visionloop", tmp_path / "src" / "visionloop")
    path = tmp_path / "src" / "visionloop" / "training" / "job.py"
    text = path.read_text().replace("one or more on the training side", "at least one for training")
    path.write_text(text + "# the end\n")
    set_compute(home, tensorboard=True, devices=2)
    done = retrain(home, PREFECT_API_URL=prefect_api, PYTHONPATH=str(tmp_path / "src"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing changed: dataset 2, params, code; nothing moved" in done.stdout
    assert find_changed(home) == set()
    code = json.loads((home / "code.json").read_text())
    assert code["weights"] == ""
    (home / "code.json").write_text(json.dumps({**code, "weights": "0" * 64}))
    assert find_changed(home) == {"embed", "train"}


def test_a_stage_by_hand_tells_how_it_is_kept(home: Path) -> None:
    for stage in ("prepare", "embed"):
        done = visionloop_here(home, stage)
        assert done.returncode == 0, done.stderr
        assert "run by hand" not in done.stdout, f"dvc has what {stage} has made"
    assert find_changed(home) == set()
    edit(home, "resamples: 200", "resamples: 300")
    told = "\nrun by hand: `dvc commit -f evaluate` keeps this result, `dvc repro` would make it again\n"
    assert visionloop_here(home, "evaluate").stdout.endswith(f"{told}next: `visionloop gate`\n")


# Long: it trains again; a refusal that stands, of another rule, is in test_what_stays, its state in test_flow_ends.
@pytest.mark.long
def test_a_verdict_that_stands_is_told_again(home: Path, prefect_api: str) -> None:
    edit(home, "gate: {", "gate: {floors: {accuracy: 0.99}, ")
    edit(home, "learning_rate: 3.0e-3", "learning_rate: 1.0e-7")
    for still, stands in (
        ("", ""),
        ("still ", "\nnothing changed: dataset 2, params, code; decision 2 stands: refused"),
    ):
        done = retrain(home, PREFECT_API_URL=prefect_api)
        assert (done.returncode, stands in done.stdout) == (3, True), done.stdout + done.stderr
        told = f"not promoted: gate: the candidate is {still}refused by the rule floor accuracy ("
        assert done.stderr.startswith(told)
    ended = find_flow_run(prefect_api, home)
    assert (ended["state_name"], ended["state_type"]) == ("Unchanged", "CANCELLED"), "no green for what was refused"


def test_a_flow_retrains_the_workspace_it_is_given(home: Path, tmp_path: Path, prefect_api: str) -> None:
    """Its process stands in another one, as every run of a deployment does that names another folder."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "params.yaml").write_text("name: other\n")
    code = "import sys; sys.path[:0] = ['flows']; from retrain import retrain; print(retrain(sys.argv[1]).headline)"
    env = {"VISIONLOOP_HOME": str(other), "PREFECT_API_URL": prefect_api}
    done = run(ROOT, sys.executable, "-c", code, str(home), **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "nothing changed: dataset 2, params, code; nothing moved\n"
    assert not (other / ".visionloop").exists()


def test_after_forget_no_file_of_the_workspace_holds_the_image(home: Path) -> None:
    """All that a retrain, its server and the commands that draw have written is searched for its bytes and pixels."""
    champion = next((home / ".visionloop" / "store" / "bundles").iterdir())
    kept = {path.read_bytes() for path in (champion / "golden").iterdir()}
    prepared = home / "data" / "prepared"
    index = pq.read_table(prepared / "index.parquet").to_pylist()
    pixels = np.load(prepared / "images-00000.npy")
    row, sha256 = next((i, r["sha256"]) for i, r in enumerate(index) if r["side"] == "train")
    data = (home / ".visionloop" / "store" / "images" / sha256[:2] / sha256).read_bytes()
    assert data not in kept, "else the champion keeps it, which is told"
    for command in ("datasets show", "train"):
        assert visionloop_here(home, *command.split()).returncode == 0, command
    sought = {"bytes": data, "pixels": pixels[row].tobytes()}
    assert {name: bool(find_holders(home, text)) for name, text in sought.items()} == {"bytes": True, "pixels": True}
    done = visionloop_here(home, "forget", sha256, "--yes")
    assert done.returncode == 0, done.stderr
    assert {name: find_holders(home, text) for name, text in sought.items()} == {"bytes": [], "pixels": []}
    assert "not known to hold no images" not in done.stdout, "a new folder wants a row in forget/hidden.py"
    assert "what MLflow keeps of " in done.stdout
    assert [path.name for path in (home / ".visionloop" / "datasets").iterdir()] == []


def find_holders(home: Path, text: bytes) -> list[str]:
    paths = (path for path in home.rglob("*") if path.is_file() and not path.is_symlink())
    return [path.relative_to(home).as_posix() for path in paths if text in path.read_bytes()]
