"""The file graph: dvc's stages, run one by one, and the digests of code and parameters that they depend on.

dvc is a command here, never an import. `python -m visionloop.pipeline` writes code.json, `--check` says if it is stale.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from visionloop import errors
from visionloop.code_digests import compute_code_digests
from visionloop.errors import BusyError, ParamsError, PipelineError, VisionLoopError, require_installed, shorten
from visionloop.lifetime import GUARDIAN_VARIABLE, Terminated, stop_process, stop_programs
from visionloop.params import Params, load_params, make_params
from visionloop.params.text import has_conflict_marks, parse_yaml
from visionloop.records import compute_digest
from visionloop.settings import PARAMS_FILE, PARENT_VARIABLE, Settings, choose_tool_environment

CODE_FILE = "code.json"
DISK_FULL = ("No space left on device", "Disk quota exceeded", "disk is full")


@dataclass(frozen=True)
class StageResult:
    """How a stage went: `ran`, `skipped` (nothing it depends on changed) or `restored` (from dvc's cache)."""

    stage: str
    status: str


def read_stage_names(home: Path) -> list[str]:
    """Return the stages of dvc.yaml, in its order. Raises PipelineError."""
    path = home / "dvc.yaml"
    try:
        return list(parse_yaml(path.read_text())["stages"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise PipelineError("dvc.yaml", "is missing or has no stages", "stages", "Restore it from git.") from exc


def refresh_code(home: Path, params: Params) -> dict[str, str]:
    """Write code.json if the code, the file of `train.weights` or the limit on pixels changed; return what it holds."""
    digests = {**compute_code_digests(), "weights": hash_weights_file(home, params)}
    digests["max_pixels"] = str(params.ingest.max_pixels)
    path = home / CODE_FILE
    text = json.dumps(digests, indent=2) + "\n"
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return digests


def hash_weights_file(home: Path, params: Params) -> str:
    """Return the sha256 of the file that `train.weights` names; empty if it names none, or one that is not there.

    Of an ONNX encoder with the file beside it that says what pixels it wants: a digest of both.
    """
    digests = []
    for path in params.train.list_files(home):
        if path.is_file():
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else compute_digest(digests) if digests else ""


def compute_state(
    home: Path, params: Params, dataset_digest: str, *, candidate_dir: Path | None = None
) -> dict[str, str]:
    """Return what a decision depends on besides the champion: digests of dataset, params, code and weights.

    With `candidate_dir` the params are those that this candidate was made with, as its card says: params.yaml may have
    been edited since.
    """
    code, weights, digest = compute_digest(compute_code_digests()), hash_weights_file(home, params), params.digest()
    if candidate_dir:
        with contextlib.suppress(
            OSError, ValueError, TypeError, KeyError, AttributeError
        ):  # the gate says what is wrong with it
            digest = params.digest(json.loads((candidate_dir / "card.json").read_bytes())["params"])
    return {"dataset": dataset_digest, "params": digest, "code": code, "weights": weights}


def read_inputs(home: Path, stage: str) -> dict[str, str]:
    """Return digests of what a stage reads of a workspace, by what dvc.yaml names; folders of data are left out.

    The names are `params.yaml train`, `code.json train`, `data/dataset.json`, and `train.weights` for its file. What is
    missing or cannot be read has a digest too.
    """
    named = _load_yaml(home / "dvc.yaml").get("stages", {}).get(stage, {})
    inputs: dict[str, str] = {}
    for entry in named.get("params", []):
        for name, keys in entry.items() if isinstance(entry, dict) else [(PARAMS_FILE, [entry])]:
            values = _load_yaml(home / name)
            inputs |= {f"{name} {key}": compute_digest(_find_value(values, str(key))) for key in keys or ["."]}
    for path in (home / str(name) for name in named.get("deps", []) if not (home / str(name)).is_dir()):
        with contextlib.suppress(OSError):
            inputs[path.relative_to(home).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    if f"{CODE_FILE} weights" in inputs:
        with contextlib.suppress(VisionLoopError, OSError):
            inputs["train.weights"] = hash_weights_file(home, load_params(home / PARAMS_FILE))
    return inputs


def check_inputs(home: Path, stage: str, before: Mapping[str, str]) -> None:
    """Refuse the end of a stage that has read something else than what is there now: dvc would record that instead.

    Raises:
        PipelineError: what `read_inputs` returned before the stage has changed.
    """
    now = read_inputs(home, stage)
    if changed := [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]:
        files = sorted({name.partition(" ")[0] for name in changed})
        what = [name.partition(" ")[2] for name in changed if " " in name]
        raise PipelineError(
            f"stage {stage}",
            f"{shorten(files)} changed while it ran{f' ({shorten(what)})' if what else ''}",
            "what it has read, at its end too",
            f"Run the same command again: it takes what is there now. Put back what was there, and {stage} is kept.",
        )


def check_recorded(home: Path, made_with: Mapping[str, Any]) -> None:
    """Refuse a candidate of which dvc.lock says that it was made with other params than its card (`made_with`) says.

    An edit may come between a stage's own look at its end and that of dvc, which records what is there then. A flow
    looks again after dvc; where dvc runs the stages by itself, the next stage does.

    Raises:
        PipelineError: the two differ.
    """
    stages = _load_yaml(home / "dvc.lock").get("stages", {})
    for stage in ("prepare", "train"):
        values = stages.get(stage, {}).get("params", {}).get(PARAMS_FILE, {})
        try:
            recorded = getattr(make_params({"name": "recorded", stage: values[stage] or {}}), stage)
        except (KeyError, ParamsError):  # not recorded, or by a code that had other keys: there is nothing to compare
            continue
        known, card = recorded.model_dump(mode="json"), made_with.get(stage) or {}
        if other := [key for key in card if key in known and card[key] != known[key]]:
            raise PipelineError(
                f"dvc.lock {stage}",
                f"says {shorten([f'{key}: {known[key]}' for key in other])}, and models/candidate was made with "
                f"{shorten([f'{key}: {card[key]}' for key in other])}",
                "what it was made with",
                f"params.yaml was edited as {stage} ended: `dvc repro -f {stage}`, then `dvc repro`.",
            )


def run_stage(
    settings: Settings,
    stage: str,
    on_line: Callable[[str], None],
    *,
    parent_run: str | None = None,
    on_start: Callable[["subprocess.Popen[str]"], None] = lambda process: None,
) -> StageResult:
    """Run one stage by `dvc repro --single-item`, passing its output on line by line.

    `parent_run` is the MLflow run of the retrain, which those of the stage are nested under. `on_start` gets dvc's
    process, which ends the stage when it is terminated.

    Raises:
        VisionLoopError: the stage's own error, as it was raised there.
        BusyError: dvc is held by another process.
        SettingsError: dvc is not installed.
        PipelineError: dvc failed otherwise, or what the stage read has changed meanwhile; dvc.lock is then as before.
    """
    require_installed("dvc")
    heal(settings)
    before, started = read_inputs(settings.home, stage), time.time()
    recorded = _read_lock(settings)
    error_path = settings.hidden_dir / "error.json"
    error_path.unlink(missing_ok=True)
    lines: list[str] = []
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", stage],
        cwd=settings.home,
        env={**make_stage_environment(settings.home, os.environ), PARENT_VARIABLE: parent_run or ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )
    try:
        on_start(process)
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            on_line(lines[-1])
        if process.wait() != 0:
            raise _read_error(error_path, stage, lines)
    except Terminated:
        stop_programs(process)
        raise
    finally:
        stop_process(process)
    status = _read_status("\n".join(lines))
    if status == "ran":
        try:
            check_inputs(settings.home, stage, before)
        except PipelineError:
            _unrecord(settings, recorded, started)
            raise
    _snapshot(settings)
    return StageResult(stage, status)


def is_up_to_date(home: Path, stage: str) -> bool | None:
    """Ask dvc whether it holds what a stage has made, from what is there now; None: it is not in use, or cannot say."""
    if not (home / "dvc.yaml").is_file():
        return None
    command = [sys.executable, "-m", "dvc", "status", "--json", stage]
    env = make_stage_environment(home, os.environ)
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError):
        if done.returncode == 0:
            return bool(json.loads(done.stdout) == {})
    return None


def make_stage_environment(home: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a stage: this Python first on PATH, tools quiet, and whom the stage works for."""
    return {
        **env,
        **choose_tool_environment(env, home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}",
        "VISIONLOOP_HOME": str(home),
        GUARDIAN_VARIABLE: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
    }


def heal(settings: Settings) -> None:
    """Mend what a kill can leave: a torn lock table blocks dvc, an emptied dvc.lock means "nothing done" to it.

    Raises:
        PipelineError: as `require_merged`.
    """
    table = settings.home / ".dvc" / "tmp" / "rwlock"
    if table.is_file() and not _is_json(table):
        table.unlink()
    require_merged(settings)
    lock, snapshot = settings.home / "dvc.lock", settings.hidden_dir / "dvc.lock"
    if lock.is_file() and snapshot.is_file() and not _is_lock(lock):
        shutil.copyfile(snapshot, lock)


def require_merged(settings: Settings) -> None:
    """Raise PipelineError if dvc.lock holds the conflict marks of a merge, which a person must settle."""
    lock = settings.home / "dvc.lock"
    if lock.is_file() and has_conflict_marks(lock.read_text(errors="replace")):
        raise PipelineError(
            "dvc.lock",
            "has the conflict marks of a merge in it",
            "one of its two sides",
            "Keep one (`git checkout --ours dvc.lock`, or --theirs), then go on: the stages that differ run again.",
        )


def init_dvc(home: Path) -> None:
    """Make the folder a dvc repository with our page for plots, if it is none. Raises PipelineError, SettingsError."""
    if (home / ".dvc" / "config").is_file():
        return
    require_installed("dvc")
    # Without git, or where git refuses the folder ("dubious ownership"), dvc works alone; it knows no subdir then.
    option = "--no-scm" if not _in_git(home) else "" if (home / ".git").exists() else "--subdir"
    command = [sys.executable, "-m", "dvc", "init", "-q", *([option] if option else [])]
    env = make_stage_environment(home, os.environ)
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError("dvc init", f"failed ({done.stderr.strip()[-200:]})", "a dvc repository")
    page = resources.files("visionloop.examples").joinpath("plots.html").read_bytes()
    (home / ".dvc" / "plots.html").write_bytes(page)
    with (home / ".dvc" / "config").open("a") as config:
        config.write("[plots]\n    html_template = plots.html\n")


def _read_error(path: Path, stage: str, lines: list[str]) -> VisionLoopError:
    with contextlib.suppress(OSError, ValueError, KeyError):
        told = json.loads(path.read_text())
        kinds = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type)}
        kind = kinds.get(told["kind"], PipelineError)
        error: VisionLoopError = kind(told["where"], told["found"], told["expected"], told["todo"])
        error.transient = told["transient"]
        return error
    text = "\n".join(lines)
    if "is busy" in text or "Unable to acquire lock" in text:
        return BusyError(
            f"stage {stage}", "dvc is held by another process", "one at a time", "Wait for it, or stop it."
        )
    if any(words in text for words in DISK_FULL):
        return errors.make_full_disk_error(f"stage {stage}", str(path.parent.parent))
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output")
    return PipelineError(f"stage {stage}", f"failed ({last[:200]})", "a finished stage", "See the log.")


def _read_status(text: str) -> str:
    if "Running stage" in text:
        return "ran"
    return "restored" if "is cached" in text else "skipped"


def _read_lock(settings: Settings) -> bytes | None:
    with contextlib.suppress(OSError):
        return (settings.home / "dvc.lock").read_bytes()
    return None


def _unrecord(settings: Settings, recorded: bytes | None, since: float) -> None:
    """Take back what dvc has recorded of a stage since a time: in dvc.lock, and in its cache of runs."""
    lock = settings.home / "dvc.lock"
    lock.unlink(missing_ok=True)
    if recorded is not None:
        lock.write_bytes(recorded)
    for path in (settings.home / ".dvc" / "cache" / "runs").glob("*/*/*"):
        if path.stat().st_mtime >= since - 1:  # file systems keep coarser times than clocks
            path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # dvc fails on a key without a value


def _snapshot(settings: Settings) -> None:
    lock = settings.home / "dvc.lock"
    if lock.is_file() and _is_lock(lock):
        settings.hidden_dir.mkdir(parents=True, exist_ok=True)
        staged = settings.hidden_dir / "dvc.lock.staged"
        shutil.copyfile(lock, staged)
        staged.replace(settings.hidden_dir / "dvc.lock")


def _load_yaml(path: Path) -> dict[str, Any]:
    """Return a mapping, of YAML or JSON; a file that is missing or cannot be read is an empty one."""
    with contextlib.suppress(OSError, ValueError):
        value = parse_yaml(path.read_text(encoding="utf-8"), path.name)
        return value if isinstance(value, dict) else {}
    return {}


def _find_value(value: Any, key: str) -> Any:
    """Return what stands under a key as dvc.yaml writes it, `train` or `train.seed`; None if nothing does."""
    for part in key.split(".") if key != "." else ():
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def _is_lock(path: Path) -> bool:
    try:
        return "stages" in parse_yaml(path.read_text())
    except (OSError, ValueError, TypeError):
        return False


def _in_git(home: Path) -> bool:
    with contextlib.suppress(OSError):  # no git on the PATH
        done = subprocess.run(["git", "rev-parse", "--git-dir"], cwd=home, capture_output=True, check=False)
        return done.returncode == 0
    return False


def is_without_git(home: Path) -> bool:
    """Say whether dvc was told to work alone in this workspace."""
    with contextlib.suppress(OSError):
        return "no_scm = true" in (home / ".dvc" / "config").read_text().lower()
    return False


def main() -> None:
    """Write code.json in this folder, or with --check exit 1 if it is stale."""
    if "--check" not in sys.argv[1:]:
        refresh_code(Path(), load_params(Path("params.yaml")))
        return
    path = Path(CODE_FILE)
    stale = not path.is_file() or not compute_code_digests().items() <= json.loads(path.read_text()).items()
    sys.exit("code.json is stale: run `make fix`" if stale else 0)


if __name__ == "__main__":
    main()
