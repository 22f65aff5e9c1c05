"""The MLflow run of a training: opened once for its params, gone on with after a kill, closed with the reason.

WORK/run.json   a token, written before the run is made, so that a kill in between leaves no second run; then its id
"""

import contextlib
import json
import re
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visionloop.errors import TrackingError
from visionloop.params.train import AFTER_TRAINING
from visionloop.records import canonical_json
from visionloop.tracking import CALL_ERRORS, MAX_PARAM_CHARS, PARENT_TAG, copy_figures
from visionloop.tracking_pages import make_note, make_used_dataset, name_run
from visionloop.training.job import Job
from visionloop.workfolder import write_file

FILE = "run.json"
TOKEN_TAG = "visionloop.token"
NETWORK_TAG = "visionloop.network_of"  # the run that the network, or its first epochs, come from
KEY_TAG = "visionloop.network_key"  # equal ones mean equal bits of a network
MAX_TAG_CHARS = 500


def open_run(work: Path, job: Job, *, network_of: str | None = None) -> str:
    """Open the run of this work folder: that of a killed process, or a new one. Raises TrackingError.

    A new one takes over the figures of the run that its network comes from: `network_of`, or where a training was
    stopped and the keys that come after the epochs were changed, the run so far.
    """
    known, params = _load(work), flatten_params(job)
    if left := _find_other(job, known, params):
        known, network_of = {}, network_of or left
    train, pin = job.params.train, job.prepared.pin
    name, used = name_run(train.network_name, train.way, pin.version), make_used_dataset(pin, job.store.url)
    token = known.get("token") or secrets.token_hex(16)
    taken = f", the network of run {network_of}" if network_of else ""
    words = make_note(f"{train.network_name}, way {train.way}, on {used.describe()}{taken}")
    tags = {**_make_tags(job), **words, TOKEN_TAG: token, **({NETWORK_TAG: network_of} if network_of else {})}
    run_id = known.get("run_id")
    if run_id is None and "token" in known:
        run_id = job.tracking.find_tagged_run(TOKEN_TAG, token)
        if run_id:
            job.tracking.log_params(run_id, params)
    if run_id is None:
        write_file(work / FILE, canonical_json({"token": token}))
    run_id = job.tracking.open_run(name, run_id=run_id, tags=tags, params=params)
    if network_of:
        figures = job.tracking.load_run(network_of).metrics
        copy_figures(job.tracking, network_of, run_id, [name for name in figures if not name.startswith("test/")])
    job.tracking.log_dataset(run_id, used, "training")
    if parent := job.settings.parent_run:  # a retrain that goes on with a training of before takes it in
        job.tracking.set_tags(run_id, {PARENT_TAG: parent})
    remember_run(work, run_id, token)
    return run_id


def _find_other(job: Job, known: Mapping[str, str], params: Mapping[str, Any]) -> str | None:
    """Return the run of this work folder, closed, if it was opened with other params: MLflow changes none.

    They are those that come after the epochs, as the work folder is that of all others.
    """
    run_id = known.get("run_id")
    if run_id is None and "token" in known:
        run_id = job.tracking.find_tagged_run(TOKEN_TAG, known["token"])
    if run_id is None:
        return None
    try:
        run = job.tracking.load_run(run_id)
    except TrackingError:  # it is gone; if MLflow is away, opening one says so
        return None
    keys = [name for name in {*run.params, *params} if name.startswith(tuple(f"train.{k}" for k in AFTER_TRAINING))]
    if not run.params or all(run.params.get(k) == str(params.get(k, ""))[:MAX_PARAM_CHARS] for k in keys):
        return None
    if run.status == "RUNNING":
        job.tracking.close_run(run_id, "KILLED")
    return run_id


def remember_run(work: Path, run_id: str, token: str = "") -> None:
    """Let this work folder go on in a run."""
    write_file(work / FILE, canonical_json({"run_id": run_id, **({"token": token} if token else {})}))


@contextlib.contextmanager
def marking_failure(job: Job, run_id: str) -> Iterator[None]:
    """Mark a run FAILED or KILLED, with the reason, if what is done in here fails.

    An MLflow that cannot be reached then must not hide the reason.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as exc:
        status, reason = ("KILLED", "stopped") if isinstance(exc, KeyboardInterrupt) else ("FAILED", str(exc))
        with contextlib.suppress(*CALL_ERRORS):
            job.tracking.set_tags(run_id, {"visionloop.ended": reason[:MAX_TAG_CHARS]})
            job.tracking.close_run(run_id, status)
        raise


def flatten_params(job: Job) -> dict[str, Any]:
    """Return what a training is made of, resolved: `train.*`, `prepare.*`, `embed.*` and the task."""
    sections = {"train": job.params.train, "prepare": job.params.prepare, "embed": job.params.embed}
    flat: dict[str, Any] = {"task": job.prepared.task}
    for name, section in sections.items():
        flat |= _flatten(name, section.model_dump(mode="json"))
    return flat


def read_git_commit(home: Path) -> str | None:
    """Return the commit of the workspace, with `-dirty` when files differ; None outside of git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=home, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


def _make_tags(job: Job) -> dict[str, str]:
    pin = job.prepared.pin
    return {
        "visionloop.dataset_version": str(pin.version),
        "visionloop.dataset_digest": pin.digest,
        "visionloop.git_commit": read_git_commit(job.settings.home) or "none",
        "visionloop.code": job.code_digest or "none",
        KEY_TAG: job.key,
        "visionloop.started_from": job.start or "none",
        "visionloop.validated_on": job.validated_on if len(job.val_rows) else "none",
        **{f"visionloop.{name}": str(value) for name, value in asdict(job.hardware).items()},
    }


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {name: leaf for key, inner in value.items() for name, leaf in _flatten(f"{prefix}.{key}", inner).items()}


def _load(work: Path) -> dict[str, str]:
    """Return what run.json knows; nothing if it is missing or damaged."""
    try:
        known = json.loads((work / FILE).read_text())
        return {key: known[key] for key in ("run_id", "token") if re.fullmatch("[0-9a-f]{32}", str(known.get(key)))}
    except (OSError, ValueError, AttributeError):
        return {}
