"""The stage `train`: prepared arrays to models/candidate. Resumable by epoch, in the same MLflow run.

.visionloop/work/train/<input key>/   run.json  checkpoints/{last,best}.ckpt  bundle/
"""

import json
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

from torch import nn

from visionloop.data.shards import load_prepared
from visionloop.errors import ParamsError, TrainingError, VisionLoopError
from visionloop.params import Params
from visionloop.records import RunNote, canonical_json
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.tracking import Tracking
from visionloop.training.hardware import read_hardware
from visionloop.training.job import Job, check_sides, choose_validation
from visionloop.training.package import write_bundle
from visionloop.training.watch import Watcher
from visionloop.training.ways import WAYS
from visionloop.workfolder import lock_work, replace_folder


def train(
    settings: Settings,
    params: Params,
    store: ObjectStore,
    tracking: Tracking,
    *,
    now: str,
    code_digest: str = "",
    watcher: Watcher | None = None,
) -> RunNote:
    """Train, export and put the bundle at models/candidate; return the note of the run.

    The same inputs go on from the last finished epoch. A random split has no validation side: such an experiment is
    validated on the test side, and its note says so.

    Raises:
        DatasetError: a class has no training image, or a side is empty.
        TrainingError: the network, its weights or its loss are unusable.
        TrackingError: MLflow cannot be reached.
    """
    started = time.perf_counter()
    prepared = load_prepared(settings.prepared_dir)
    validated_on = choose_validation(prepared, store)
    check_sides(prepared, validated_on)
    job = Job(
        settings, params, store, tracking, prepared, read_hardware(), code_digest, watcher or Watcher(), validated_on
    )
    with lock_work(settings.work_dir("train"), job.make_key()) as work:
        run_id = _open_run(work, job)
        try:
            classifier = _learn(work, job, run_id)
            digest = _package(work, job, classifier, run_id)
        except KeyboardInterrupt:
            tracking.close_run(run_id, "KILLED")
            raise
        except (VisionLoopError, RuntimeError) as exc:
            tracking.close_run(run_id, "FAILED")
            if isinstance(exc, VisionLoopError):
                raise
            raise TrainingError("train", f"torch failed ({str(exc).splitlines()[0][:200]})") from exc
        seconds = round(time.perf_counter() - started, 1)
        note = RunNote(digest, run_id, read_git_commit(settings.home), now, seconds, {"validated_on": validated_on})
        _write_note(settings, note)
        replace_folder(work / "bundle", settings.candidate_dir)
        tracking.close_run(run_id)
        shutil.rmtree(work)
    return note


def _learn(work: Path, job: Job, run_id: str) -> nn.Module:
    way = job.params.train.way
    if way not in WAYS:
        raise ParamsError(
            "params.yaml train.way", f"got {way!r}", f"one of {', '.join(sorted(WAYS))}", "Edit the file."
        )
    return WAYS[way](work, job, run_id)


def read_git_commit(home: Path) -> str | None:
    """Return the commit of the workspace, with `-dirty` when files differ; None outside of git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=home, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


def _open_run(work: Path, job: Job) -> str:
    """Open the MLflow run of this input key: the one that a killed process had opened, or a new one."""
    path = work / "run.json"
    known = json.loads(path.read_text())["run_id"] if path.is_file() else None
    sections = {"train": job.params.train, "prepare": job.params.prepare}
    flat = {f"{s}.{k}": v for s, m in sections.items() for k, v in m.model_dump(mode="json").items()}
    pin = job.prepared.pin
    tags = {
        "visionloop.dataset_version": str(pin.version),
        "visionloop.dataset_digest": pin.digest,
        "visionloop.git_commit": read_git_commit(job.settings.home) or "none",
        **{f"visionloop.{k}": str(v) for k, v in asdict(job.hardware).items()},
    }
    run_name = f"{job.params.train.backbone}-dataset{pin.version}"
    run_id = job.tracking.open_run(run_name, run_id=known, tags=tags, params=flat)
    staged = path.with_suffix(".new")
    staged.write_bytes(canonical_json({"run_id": run_id}))
    staged.replace(path)
    return run_id


def _package(work: Path, job: Job, classifier: nn.Module, run_id: str) -> str:
    """Write the bundle into the work folder, show it in MLflow, and return its digest."""
    folder = work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    way = {"precision": job.hardware.precision, "threads": str(job.hardware.threads)}
    digest = write_bundle(folder, classifier, job, way=way)
    job.tracking.set_tags(run_id, {"visionloop.bundle": digest})
    job.tracking.log_artifact(run_id, folder / "card.json", "bundle")
    job.tracking.log_artifact(run_id, folder / "golden", "bundle/golden")
    return digest


def _write_note(settings: Settings, note: RunNote) -> None:
    settings.runs_dir.mkdir(parents=True, exist_ok=True)
    (settings.runs_dir / f"{note.bundle}.json").write_bytes(canonical_json(note.to_json()))
