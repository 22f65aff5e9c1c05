"""The stage `train`: prepared arrays to models/candidate. Resumable by epoch, in the same MLflow run.

.visionloop/work/train/<input key>/   run.json  memory.json  checkpoints/  training/  and when it is finished: bundle/
                                      done.json
                      <input key>/engines/   what engines gave for images, and the graph in int8: of the network alone
                      <input key>/again/   run.json  bundle/  done.json   the same network with another card

What is finished stays there until other inputs come: dvc deletes models/candidate before it runs the stage again, also
when it was killed before it had taken the bundle. What only the card depends on (thresholds, when to abstain, engines)
is none of the input key: where that alone has changed, the finished network is packed again, and no epoch runs.
"""

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from visionloop.bundle import download_bundle, load_bundle
from visionloop.errors import DiskError, ParamsError, TrackingError, TrainingError, VisionLoopError, shorten
from visionloop.features.view import load_facts
from visionloop.lifetime import terminable
from visionloop.networks.weights import describe_start
from visionloop.params import WAYS_ON_EMBEDDINGS
from visionloop.params.train import AFTER_TRAINING
from visionloop.promotion.ledger import read_champion
from visionloop.records import RunNote, canonical_json
from visionloop.training.batches import check_world
from visionloop.training.checkpoints import FOLDER, list_checkpoints, load_saved
from visionloop.training.checks import TrainingData
from visionloop.training.datamodule import make_lost_reader_error
from visionloop.training.job import Call, Job
from visionloop.training.loop import is_out_of_memory, load_plan
from visionloop.training.mirror import fetch_checkpoints, find_run, remove_checkpoints
from visionloop.training.package import write_bundle, write_bundle_again
from visionloop.training.plots import SHOWN
from visionloop.training.precision import choose_hardware
from visionloop.training.ranks.world import compare_facts, join_world, share
from visionloop.training.run import KEY_TAG, marking_failure, open_run, read_git_commit, remember_run
from visionloop.training.ways import WAYS
from visionloop.training.ways.network import choose_start, has_work_here
from visionloop.workfolder import DONE, link_folder, list_work, lock_work, replace_folder, write_file
from visionloop.workspace import Workspace

AGAIN = "again"  # in the work folder: the finished network with another card, the newest one
ENGINES = "engines"  # there too: what was computed for the checks of engines
KEPT = frozenset({"bundle", SHOWN, DONE, "run.json", AGAIN, ENGINES})  # of its work folder
ENDING, NETWORK_OF = "ending", "network_of"  # of a note: how the network was packed, and the run that it comes from
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True)
class Trained:
    """A trained classifier with its best weights, why training ended, and the figures of its best epoch.

    A way without epochs has `num_epochs` 0 and no figures here.
    """

    classifier: nn.Module
    reason: str
    best_epoch: int
    num_epochs: int
    metrics: dict[str, float]


def train(workspace: Workspace, data: TrainingData, call: Call) -> RunNote | None:
    """Train, export and put the bundle at models/candidate; return the note of the run, None on ranks but the first.

    The same inputs go on from the last finished epoch, or take what is finished. A random split has no validation side:
    such an experiment is validated on the test side, and its note says so.

    Raises:
        ParamsError, DatasetError: what `make_job` raises.
        TrainingError: the network, its weights or its loss are unusable, the disk is full, or there is no memory for
            one image.
        TrackingError: MLflow cannot be reached.
        KeyboardInterrupt: it was stopped, by Ctrl-C or SIGTERM; what is kept was told.
    """
    with translated(), join_world(call.world, workspace.params.compute, workspace.settings.hidden_dir):
        job = make_job(workspace, data, call)
        if call.world.is_first:
            return _lead(job, call.now)
        _follow(job)
    return None


def make_job(workspace: Workspace, data: TrainingData, call: Call) -> Job:
    """Resolve what a training depends on, before anything is opened.

    Raises:
        ParamsError: params.yaml asks for what this machine does not have.
        DatasetError: there are more ranks than images in a batch.
        TrainingError: the ranks do not see the same params, data, code or processors.
    """
    params, world = workspace.params, call.world
    hardware, remarks = choose_hardware(workspace, data.prepared, world)
    for remark in [*remarks, *describe_start(params.train, data.prepared.size_hw)] if world.is_first else remarks:
        call.watcher.tell(remark)
    job = Job(
        workspace.settings,
        workspace.params,
        workspace.store,
        workspace.tracking,
        data.prepared,
        hardware,
        call.code_digest,
        call.watcher,
        data.validated_on,
        world=world,
    )
    if world.size > 1:
        check_world(job.train_rows, params.train.batch_size * params.train.accumulate, world)
        compare_facts(world, job.list_facts())
    # The ledger may move between two looks at it: rank 0's counts.
    return replace(job, start=share(world, lambda: choose_start(job, _has_work).start))


def learn(job: Job, work: Path, run_id: str) -> Trained:
    """Train in a work folder and an MLflow run, without making a bundle. Raises TrainingError, KeyboardInterrupt."""
    way = job.params.train.way
    if way not in WAYS:
        raise ParamsError(
            "params.yaml train.way", f"got {way!r}", f"one of {', '.join(sorted(WAYS))}", "Edit the file."
        )
    classifier = WAYS[way](work, job, run_id)
    paths = list_checkpoints(work / FOLDER)
    if not paths:
        return Trained(classifier, "no epochs", 0, 0, {})
    last = load_saved(paths[0])
    return Trained(classifier, last.ended or "stopped", last.best_epoch, last.epoch, dict(last.best.metrics))


def describe_stop(work: Path, max_epochs: int) -> str:
    """Say where a training was stopped, what is kept of it, and how it goes on."""
    paths = list_checkpoints(work / FOLDER)
    if not paths:
        return "stopped before the first epoch was finished; the same command begins anew"
    saved = load_saved(paths[0])
    if saved.ended or saved.epoch >= max_epochs:
        return "stopped after the last epoch; the same command goes on with making the bundle"
    epoch = saved.epoch
    return f"stopped in epoch {epoch + 1}; the same command goes on from epoch {epoch + 1} ({epoch} are kept)"


def translate_error(exc: Exception) -> Exception:
    """Return what a person should read of an error: torch's as one of ours, a bug as it is."""
    if isinstance(exc, VisionLoopError):
        return exc
    text = " ".join(str(exc).split())[:200]
    if is_out_of_memory(exc):
        return TrainingError("train", f"out of memory ({text})", "more of it", "Use a smaller network or image size.")
    if isinstance(exc, OSError) and exc.errno in NO_SPACE:
        todo = "Free some; the same command goes on from the last finished epoch."
        return DiskError(exc.filename or "train", f"cannot be written ({exc.strerror})", "a disk with free space", todo)
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


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise what a person should read of an error."""
    try:
        yield
    except Exception as exc:
        error = translate_error(exc)
        if error is exc:
            raise
        raise error from exc


def _has_work(job: Job) -> bool:
    """Say whether a training of this job was begun and not finished, here or by a machine that shares the store.

    One that is finished here with another ending (`Job.ending`) is not finished: its network is packed again.
    """
    if has_work_here(job):
        work = job.settings.work_dir("train") / job.key[:16]
        newest = _load_note(work / AGAIN) or _load_note(work)
        return newest is None or newest.extra.get(ENDING) != job.ending
    return find_run(job) is not None


def _follow(job: Job) -> None:
    """Take part in a training that rank 0 leads: no lock, no MLflow, no bundle. Raises what learning raises."""
    if place := share(job.world, dict):
        learn(job, Path(place["work"]), place["run_id"])


def _lead(job: Job, now: str) -> RunNote:
    """Train as the only process, or as rank 0 of several: it alone has the lock, the MLflow run and the bundle."""
    before = list_work(job.settings.work_dir("train"))
    with terminable(), lock_work(job.settings.work_dir("train"), job.key) as work:
        for dropped in before - {work.name}:
            remove_checkpoints(job, dropped)
        finished = _find_finished(work, job) or _fetch_champion(work, job)
        if finished is None:
            place, note = work, _make_bundle(work, job, now)
        else:
            share(job.world, dict)  # the other ranks have nothing to do
            place, note = _choose_ending(work, job, finished, now)
        _deliver(place, job, note, work)
    return note


def _find_finished(work: Path, job: Job) -> RunNote | None:
    """Return the note of what is finished in a folder, if its bundle is whole and MLflow has its run."""
    note = _load_note(work)
    try:
        if note:
            load_bundle(work / "bundle", expected_digest=note.bundle)
            job.tracking.load_run(note.run_id)
    except (OSError, ValueError, KeyError, TypeError, TrackingError):
        return None
    return note


def _fetch_champion(work: Path, job: Job) -> RunNote | None:
    """Bring the champion's bundle as what is finished here, if it is this very network with another card, else None.

    So another machine, or one whose work folder is lost, need not train for a card. A store, an MLflow or a bundle
    that cannot be read costs a training, as where there is no champion.
    """
    try:
        entry = read_champion(job.store, job.name)
        run = job.tracking.load_run(entry.run_id) if entry and entry.run_id else None
        if entry is None or run is None or run.tags.get(KEY_TAG) != job.key:
            return None
        bundle = download_bundle(job.store, entry.bundle, job.settings.hidden_dir / "bundles", with_weights=True)
        keys = {f"train.{key}": bundle.card.params["train"][key] for key in AFTER_TRAINING}
    except (VisionLoopError, OSError, KeyError, TypeError):
        return None
    ending = {**keys, "ingest.max_pixels": bundle.card.max_pixels}
    if ending == job.ending:
        return None
    link_folder(bundle.folder, work / "bundle")
    commit = run.tags.get("visionloop.git_commit", "none").removeprefix("none") or None
    facts = {"validated_on": job.validated_on, ENDING: ending}
    note = RunNote(bundle.digest, run.run_id, commit, entry.at, extra=facts)
    write_file(work / DONE, canonical_json(note.to_json()))
    return note


def _load_note(work: Path) -> RunNote | None:
    try:
        note: RunNote = RunNote.from_json(json.loads((work / DONE).read_bytes()))
        is_whole = isinstance(note.extra[ENDING], dict)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return note if is_whole else None


def _choose_ending(work: Path, job: Job, finished: RunNote, now: str) -> tuple[Path, RunNote]:
    """Return the folder whose bundle is this job's, and its note: of the training, or of its network packed again."""
    again = work / AGAIN
    if finished.extra.get(ENDING) == job.ending:
        shutil.rmtree(again, ignore_errors=True)
        place, note = work, finished
    else:
        place, found = again, _find_finished(again, job)
        if found is None or found.extra.get(ENDING) != job.ending:
            return again, _pack_again(work, job, finished, now)
        note = found
    job.watcher.tell("this training is finished already (same data, params and code): its bundle is taken")
    return place, note


def _pack_again(work: Path, job: Job, finished: RunNote, now: str) -> RunNote:
    """Pack the finished network with another card, in a run of its own; leave the bundle and its note in AGAIN."""
    started, again = time.perf_counter(), work / AGAIN
    if (again / DONE).exists():
        shutil.rmtree(again)
    again.mkdir(exist_ok=True)
    before = finished.extra[ENDING]
    changed = shorten([key for key, value in job.ending.items() if before.get(key) != value])
    job.watcher.tell(f"the network of run {finished.run_id[:8]} is taken again, no epoch runs: only {changed} changed")
    run_id = open_run(again, job, network_of=finished.run_id)
    with marking_failure(job, run_id), translated():
        shutil.rmtree(again / "bundle", ignore_errors=True)
        digest = write_bundle_again(again / "bundle", load_bundle(work / "bundle"), job, work / ENGINES)
        _show_bundle(again / "bundle", job, run_id, digest)
        job.tracking.set_tags(run_id, {"visionloop.ended": "no epochs: the network of another run, with another card"})
    return _keep_note(again, job, RunNote(digest, run_id, None, now, 0.0, {NETWORK_OF: finished.run_id}), started)


def _make_bundle(work: Path, job: Job, now: str) -> RunNote:
    """Train, and leave the bundle and its note in the work folder."""
    started = time.perf_counter()
    if known := fetch_checkpoints(work, job):
        remember_run(work, known)
    run_id = open_run(work, job)
    with marking_failure(job, run_id), translated():
        share(job.world, lambda: {"work": str(work), "run_id": run_id})
        try:
            trained = learn(job, work, run_id)
            digest = _package(work, job, trained.classifier, run_id)
        except KeyboardInterrupt:
            job.watcher.tell(describe_stop(work, job.params.train.max_epochs))
            raise
        job.tracking.set_tags(run_id, {"visionloop.ended": trained.reason})
    return _keep_note(work, job, RunNote(digest, run_id, None, now), started)


def _keep_note(work: Path, job: Job, note: RunNote, started: float) -> RunNote:
    """Add to a note what every one has, and leave it in the work folder: with it, what it is about is finished."""
    note = replace(
        note,
        git_commit=read_git_commit(job.settings.home),
        seconds=round(time.perf_counter() - started, 1),
        extra={**note.extra, "validated_on": job.validated_on, ENDING: job.ending},
    )
    write_file(work / DONE, canonical_json(note.to_json()))
    return note


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
    digest = write_bundle(folder, classifier, job, work / ENGINES, way=way)
    _show_bundle(folder, job, run_id, digest)
    return digest


def _show_bundle(folder: Path, job: Job, run_id: str, digest: str) -> None:
    job.tracking.set_tags(run_id, {"visionloop.bundle": digest})
    job.tracking.log_artifact(run_id, folder / "card.json", "bundle")
    job.tracking.log_artifact(run_id, folder / "golden", "bundle/golden")


def _deliver(place: Path, job: Job, note: RunNote, work: Path) -> None:
    """Put the finished bundle of a place at models/candidate, the training's curve into reports/, and close its run.

    Whatever fails here, the next process does again. A way without epochs has no curve: its folder is empty.

    Raises:
        TrackingError: MLflow cannot be reached; the bundle is there.
    """
    settings = job.settings
    write_file(settings.runs_dir / f"{note.bundle}.json", canonical_json(note.to_json()))
    (work / SHOWN).mkdir(exist_ok=True)
    for made, target in ((work / SHOWN, settings.reports_dir / SHOWN), (place / "bundle", settings.candidate_dir)):
        link_folder(made, work / "delivered")
        replace_folder(work / "delivered", target)
    if job.tracking.load_run(note.run_id).status != "FINISHED":
        job.tracking.close_run(note.run_id)
    remove_checkpoints(job, work.name)
    for path in work.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
