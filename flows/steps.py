"""The steps of a retrain as Prefect tasks: they chain, retry what is transient, and report; the library does the work.

Arguments and results are small JSON values: paths, digests, counts.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from visionloop import pipeline
from visionloop.data.manifest import load_pin, load_records, make_image_key
from visionloop.errors import ServingError, VisionLoopError
from visionloop.lifetime import stop_process
from visionloop.records import LABEL_SEPARATOR, ImageRecord
from visionloop.words import (
    describe_champion,
    describe_decision,
    describe_pull,
    describe_registered,
    make_log_progress,
)
from visionloop.workspace import Workspace, get_now, get_user, open_workspace

RETRIES = 2
RETRY_DELAY_S = 4
SERVER_START_S = 60
# What dvc itself says around a stage's own lines; all of it is in the log.
DVC_CHATTER = (
    "Running stage",
    "Data and pipelines",
    "> ",
    "Updating lock",
    "Generating lock",
    "Use `dvc push`",
    "To ",
    "\tgit",
    "\tdvc",
)
LOCK_TABLE = "RWLock-file"  # dvc says in several lines that it has taken a killed process out of its table of locks


def is_transient(task: Any, run: TaskRun, state: State[Any]) -> bool:
    """Say whether trying again may help: a typo in params.yaml stays a typo."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, VisionLoopError) and error.transient


def say(line: str) -> None:
    """Tell the person who waits, and the log: lines marked so are shown on the terminal."""
    get_run_logger().info(line, extra={"told": True})


step = task(retries=RETRIES, retry_delay_seconds=RETRY_DELAY_S, retry_condition_fn=is_transient, cache_policy=NO_CACHE)


@step(name="ingest")
def ingest(home: str) -> dict[str, Any]:
    """Pull the declared sources; a workspace without sources keeps the version it has pinned."""
    from visionloop.ingest.pull import pull

    workspace = open_workspace(Path(home))
    pipeline.refresh_code(workspace.settings.home, workspace.params)
    sources = workspace.params.ingest.sources
    if not sources:
        pin = load_pin(workspace.settings.pin_path)
        load_records(workspace.store, pin)
        say(f"  no source in params.yaml: dataset {pin.name} stays at version {pin.version}")
        return pin.to_json()
    progress = make_log_progress("  checked", "images", say)
    report = pull(
        workspace,
        sources=sources,
        now=get_now(),
        env=os.environ,
        tell=lambda line: say(f"  {line}"),
        on_progress=progress,
    )
    for line in describe_pull(report):
        say(f"  {line}")
    return report.pin.to_json()


@step(name="stage")
def run_stage(home: str, stage: str) -> str:
    """Run one dvc stage; return ran, skipped or restored."""
    workspace = open_workspace(Path(home))

    def on_line(line: str) -> None:
        if line and LOCK_TABLE not in line and not line.startswith((*DVC_CHATTER, "Stage '")):
            say(f"  {line}")
        else:
            get_run_logger().debug(line)

    result = pipeline.run_stage(workspace.settings, stage, on_line)
    if result.status != "ran":
        words = {"skipped": "nothing it depends on changed", "restored": "made before, restored from dvc's cache"}
        say(f"  {words[result.status]}")
    return result.status


@step(name="gate")
def gate(home: str) -> dict[str, Any]:
    """Judge the candidate against the champion; return the decision."""
    from visionloop.promotion.decide import gate as run_gate

    workspace = open_workspace(Path(home))
    settings = workspace.settings
    state = pipeline.compute_state(settings.home, workspace.params, load_pin(settings.pin_path).digest)
    decision = run_gate(workspace, state=state, now=get_now())
    for line in describe_decision(decision):
        say(f"  {line}")
    return decision.to_json()


@step(name="register")
def register(home: str) -> str:
    """Copy the bundle to the store and mirror it in MLflow; return the model version."""
    from visionloop.promotion.promote import register as run_register

    workspace = open_workspace(Path(home))
    version = run_register(workspace)
    say(f"  {describe_registered(workspace.name, version)}")
    return version


@step(name="promote")
def promote(home: str, why: str) -> dict[str, Any]:
    """Write the ledger entry and set MLflow's alias; return the entry."""
    from visionloop.promotion.promote import promote as run_promote

    workspace = open_workspace(Path(home))
    entry = run_promote(workspace, by=get_user(), why=why, now=get_now())
    say(f"  {describe_champion(entry)}")
    return entry.to_json()


@step(name="ask")
def ask(home: str, number: int = 3) -> list[dict[str, Any]]:
    """Start the server on a free port, ask it about held-out images over HTTP, stop it; return the answers."""
    workspace = open_workspace(Path(home))
    chosen = _choose_held_out(workspace, number)
    process = subprocess.Popen(
        [sys.executable, "-m", "visionloop", "serve", "--port", "0"],
        cwd=home,
        env=pipeline.make_stage_environment(workspace.settings.home, os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        url = _wait_for_url(process)
        say(f"  server at {url}")
        answers = []
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            for record in chosen:
                data = workspace.store.get(make_image_key(record.sha256))
                body = client.post("/predict", content=data).raise_for_status().json()
                answer = {k: body[k] for k in ("prediction", "confidence", "labels") if k in body}
                answers.append({**answer, "actual": LABEL_SEPARATOR.join(record.labels), "origin": record.origins[0]})
                say(f"  asked about {describe_asked(record.labels, body)} ({body['confidence']:.1%})")
    except httpx.HTTPError as exc:
        raise ServingError("server", f"did not answer ({exc})", "an answer") from exc
    finally:
        stop_process(process)
    return answers


def describe_asked(labels: Sequence[str], body: Mapping[str, Any]) -> str:
    """Tell what an image is and what the server says: `a ring: disc`, or with several labels `disc, ring: disc`."""
    if "labels" not in body:
        return f"a {labels[0]}: {body['prediction']}"
    return f"an image of {', '.join(labels) or 'nothing'}: {', '.join(body['labels']) or 'nothing'}"


def _choose_held_out(workspace: Workspace, number: int) -> list[ImageRecord]:
    """Choose test images spread over the classes."""
    records = load_records(workspace.store, load_pin(workspace.settings.pin_path))
    tests = sorted((r for r in records if r.side == "test" and r.labels), key=lambda r: (r.labels, r.sha256))
    spread = [len(tests) * (2 * i + 1) // (2 * number) for i in range(number)]
    return [tests[i] for i in dict.fromkeys(spread) if i < len(tests)]


def _wait_for_url(process: subprocess.Popen[str]) -> str:
    """Return the address from the line that the server prints when it is ready. Raises ServingError."""
    alarm = threading.Timer(SERVER_START_S, process.kill)
    alarm.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if " on http://" in line:
                return line.split(" on ", 1)[1].split()[0]
    finally:
        alarm.cancel()
    raise ServingError("server", f"did not start ({json.dumps(lines[-1:])[:300]})", "a line with its address")
