"""The stage `train`: prepared arrays to models/candidate. Resumable by epoch, in the same MLflow run.

.visionloop/work/train/<input key>/   run.json  memory.json  checkpoints/  bundle/
"""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from visionloop.data.shards import Prepared, load_prepared
from visionloop.errors import ParamsError, TrainingError, VisionLoopError
from visionloop.features.view import load_facts
from visionloop.lifetime import terminable
from visionloop.params import WAYS_ON_EMBEDDINGS
from visionloop.records import RunNote, canonical_json
from visionloop.settings import Settings
from visionloop.training.checkpoints import FOLDER, list_entries
from visionloop.training.datamodule import check_world
from visionloop.training.figures import check_monitor
from visionloop.training.job import Job, World, check_sides, choose_validation
from visionloop.training.loader import make_lost_reader_error
from visionloop.training.loop import is_out_of_memory, load_plan
from visionloop.training.mirror import announce, fetch_checkpoints, find_run, remove_checkpoints
from visionloop.training.package import write_bundle
from visionloop.training.precision import choose_hardware
from visionloop.training.ranks.world import check_agreement, share
from visionloop.training.run import close_failed, open_run, read_git_commit, remember_run
from visionloop.training.watch import Watcher
from visionloop.training.ways import WAYS
from visionloop.training.ways.network import choose_start, has_work_here
from visionloop.workfolder import list_work, lock_work, replace_folder
from visionloop.workspace import Workspace


@dataclass(frozen=True)
class Outcome:
    """A trained classifier with its best weights, why training ended, and the figures of its best epoch.

    A way without epochs has `num_epochs` 0 and no figures here.
    """

    classifier: nn.Module
    reason: str
    best_epoch: int
    num_epochs: int
    metrics: dict[str, float]


def train(
    workspace: Workspace, *, now: str, code_digest: str = "", watcher: Watcher | None = None, world: World | None = None
) -> RunNote:
    """Train, export and put the bundle at models/candidate; return the note of the run. For rank 0 of a world.

    The same inputs go on from the last finished epoch. A random split has no validation side: such an experiment is
    validated on the test side, and its note says so.

    Raises:
        DatasetError: a class has no training image, or a side is empty.
        TrainingError: the network, its weights or its loss are unusable, or there is no memory for one image.
        TrackingError: MLflow cannot be reached.
        KeyboardInterrupt: it was stopped, by Ctrl-C or SIGTERM; what is kept was told.
    """
    settings = workspace.settings
    started = time.perf_counter()
    watcher = watcher or Watcher()
    job = make_job(workspace, code_digest=code_digest, watcher=watcher, world=world)
    before = list_work(settings.work_dir("train"))
    with terminable(), lock_work(settings.work_dir("train"), job.make_key()) as work:
        for dropped in before - {work.name}:
            remove_checkpoints(job, dropped)
        run_id = _open(work, job)
        try:
            outcome = learn(job, work, run_id)
            digest = _package(work, job, outcome.classifier, run_id)
            workspace.tracking.set_tags(run_id, {"visionloop.ended": outcome.reason})
        except KeyboardInterrupt:
            close_failed(job, run_id, "KILLED", "stopped")
            watcher.tell(describe_stop(work, workspace.params.train.max_epochs))
            raise
        except Exception as exc:
            error = translate_error(exc)
            close_failed(job, run_id, "FAILED", str(error))
            if error is exc:
                raise
            raise error from exc
        seconds = round(time.perf_counter() - started, 1)
        note = RunNote(digest, run_id, read_git_commit(settings.home), now, seconds, {"validated_on": job.validated_on})
        _write_note(settings, note)
        replace_folder(work / "bundle", settings.candidate_dir)
        workspace.tracking.close_run(run_id)
        remove_checkpoints(job, work.name)
        shutil.rmtree(work)
    return note


def follow(workspace: Workspace, *, world: World, code_digest: str) -> None:
    """Take part in a training that rank 0 leads: no lock, no MLflow, no bundle. Raises what learning raises."""
    job = make_job(workspace, code_digest=code_digest, watcher=Watcher(), world=world)
    place = share(world, dict)
    try:
        learn(job, Path(place["work"]), place["run_id"])
    except Exception as exc:
        error = translate_error(exc)
        if error is exc:
            raise
        raise error from exc


def make_job(
    workspace: Workspace,
    *,
    code_digest: str,
    watcher: Watcher,
    world: World | None = None,
    prepared: Prepared | None = None,
) -> Job:
    """Resolve what a training depends on, and check it before anything is opened.

    Raises:
        ParamsError: params.yaml asks for what this machine or this data does not have.
        DatasetError: there is no prepared data, a class has no training image, a side is empty, or there are more ranks
            than images in a batch.
        TrainingError: the ranks do not see the same params, data, code or processors.
    """
    params = workspace.params
    world = world or World()
    prepared = prepared or load_prepared(workspace.settings.prepared_dir)
    check_monitor(params.train, prepared.task)
    validated_on = choose_validation(prepared, workspace.store)
    check_sides(prepared, validated_on)
    hardware, remarks = choose_hardware(workspace, prepared, world)
    for remark in remarks:
        watcher.tell(remark)
    job = Job(
        workspace.settings,
        params,
        workspace.store,
        workspace.tracking,
        prepared,
        hardware,
        code_digest,
        watcher,
        validated_on,
        world=world,
    )
    if world.size > 1:
        check_world(job.train_rows, params.train.batch_size * params.train.accumulate, world)
        check_agreement(job)
    # The ledger may move between two looks at it: rank 0's counts.
    return replace(job, start=share(world, lambda: choose_start(job, _has_work).start))


def learn(job: Job, work: Path, run_id: str) -> Outcome:
    """Train in a work folder and an MLflow run, without making a bundle. Raises TrainingError, KeyboardInterrupt."""
    way = job.params.train.way
    if way not in WAYS:
        raise ParamsError(
            "params.yaml train.way", f"got {way!r}", f"one of {', '.join(sorted(WAYS))}", "Edit the file."
        )
    classifier = WAYS[way](work, job, run_id)
    entries = list_entries(work / FOLDER)
    if not entries:
        return Outcome(classifier, "no epochs", 0, 0, {})
    last = entries[0]
    return Outcome(classifier, last.ended or "stopped", last.best_epoch, last.epoch, dict(last.best.metrics))


def describe_stop(work: Path, max_epochs: int) -> str:
    """Say where a training was stopped, what is kept of it, and how it goes on."""
    entries = list_entries(work / FOLDER)
    epoch = entries[0].epoch if entries else 0
    if not entries:
        return "stopped before the first epoch was finished; the same command begins anew"
    if entries[0].ended or epoch >= max_epochs:
        return "stopped after the last epoch; the same command goes on with making the bundle"
    return f"stopped in epoch {epoch + 1}; the same command goes on from epoch {epoch + 1} ({epoch} are kept)"


def translate_error(exc: Exception) -> Exception:
    """Return what a person should read of an error: torch's as one of ours, a bug as it is."""
    if isinstance(exc, VisionLoopError):
        return exc
    text = " ".join(str(exc).split())[:200]
    if is_out_of_memory(exc):
        return TrainingError("train", f"out of memory ({text})", "more of it", "Use a smaller network or image size.")
    if "DataLoader worker" in text:  # raised by a signal handler of torch, wherever we were by then
        return make_lost_reader_error(exc)
    if "more than 1 value per channel" in text:
        return TrainingError(
            "train",
            "a batch of one image reached a batch norm, which needs two values or more",
            "two images or more in every batch",
            "Raise train.batch_size, add training images, or take larger ones (prepare.image_size).",
        )
    return TrainingError("train", f"torch failed ({text})") if isinstance(exc, RuntimeError) else exc


def _has_work(job: Job) -> bool:
    """Say whether a training of this job was begun, here or by a machine that shares the store."""
    return has_work_here(job) or find_run(job) is not None


def _open(work: Path, job: Job) -> str:
    """Bring what the store has of this training, and open its run; tell both to the other ranks."""
    if run_id := fetch_checkpoints(work, job):
        remember_run(work, run_id)
    run_id = open_run(work, job)
    announce(job, run_id)
    place = share(job.world, lambda: {"work": str(work), "run_id": run_id})
    return str(place["run_id"])


def _package(work: Path, job: Job, classifier: nn.Module, run_id: str) -> str:
    """Write the bundle into the work folder, show it in MLflow, and return its digest."""
    folder = work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    way = {"precision": job.hardware.precision, "threads": str(job.hardware.threads)}
    if job.params.train.way in WAYS_ON_EMBEDDINGS:
        facts = load_facts(job.settings.features_dir)
        way["embeddings"] = f"{facts.runtime} {facts.precision}"
    if job.world.size > 1:
        way["processes"] = str(job.world.size)
    if (plan := load_plan(work, job.params.train)).is_reduced:
        way["batch_in_memory"] = str(plan.batch_in_memory)
    digest = write_bundle(folder, classifier, job, way=way)
    job.tracking.set_tags(run_id, {"visionloop.bundle": digest})
    job.tracking.log_artifact(run_id, folder / "card.json", "bundle")
    job.tracking.log_artifact(run_id, folder / "golden", "bundle/golden")
    return digest


def _write_note(settings: Settings, note: RunNote) -> None:
    settings.runs_dir.mkdir(parents=True, exist_ok=True)
    (settings.runs_dir / f"{note.bundle}.json").write_bytes(canonical_json(note.to_json()))
