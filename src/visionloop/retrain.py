"""One retrain, step by step: ingest, the stages of dvc.yaml, gate, register, promote.

`visionloop start` runs the steps as they are; a flow runs each as a task of its own, with retries.
Each step takes the workspace's folder and returns a JSON value.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from visionloop import pipeline
from visionloop.data.known_store import check_store
from visionloop.data.manifest import load_pin, load_records
from visionloop.promotion.ledger import latest_decision, read_champion
from visionloop.records import Decision
from visionloop.words import (
    Summary,
    describe_champion,
    describe_decision,
    describe_mlflow,
    describe_outcome,
    describe_pull,
    describe_registered,
    describe_unchanged,
    make_log_progress,
    shorten_path,
)
from visionloop.workspace import Workspace, get_now, get_user, open_workspace

Tell = Callable[[str], None]
RunStep = Callable[[str, Callable[[], Any]], Any]
# What dvc itself says around a stage's own lines, and the stage's error, which is raised and told.
DVC_CHATTER = (
    *("Running stage", "Data and pipelines", "> ", "Updating lock", "Generating lock", "Use `dvc push`", "To "),
    *("\tgit", "\tdvc", "Stage '", "ERROR: failed to reproduce", "error: "),
)
LOCK_TABLE = "RWLock-file"  # dvc says in several lines that it has taken a killed process out of its table of locks


def bring_up_to_date(
    workspace: Workspace,
    *,
    tell: Tell,
    run_step: RunStep = lambda name, work: work(),
    ask: Callable[[str, Tell], list[dict[str, Any]]] | None = None,
    tell_more: Tell = lambda line: None,
) -> Summary:
    """Do the steps one by one, as far as they lead, and return what came of them.

    `run_step` runs a step by its name; `ask` is a last one, that asks the served champion; `tell_more` gets dvc's own
    lines. Raises what the steps raise.
    """
    home = str(workspace.settings.home)
    stages = pipeline.read_stage_names(workspace.settings.home)
    seconds: dict[str, float] = {}
    total = len(stages) + 4 + (ask is not None)

    def step(name: str, what: str, work: Callable[[], Any]) -> Any:
        tell(f"[{len(seconds) + 1}/{total}] {name}: {what}")
        started = time.perf_counter()
        result = run_step(name, work)
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    dataset = step("ingest", "new images into the store", lambda: ingest(home, tell))
    unchanged = find_unchanged(workspace, dataset)
    if unchanged:
        tell(describe_unchanged(unchanged))
        return _summarise(workspace, unchanged, "unchanged", seconds)
    for stage in stages:
        step(stage, "dvc stage", partial(run_stage, home, stage, tell, tell_more))
    decision = Decision.from_json(step("gate", "candidate against champion", lambda: gate(home, tell)))
    if decision.verdict != "passed":
        return _summarise(workspace, decision, decision.verdict, seconds)
    step("register", "bundle to the store and to MLflow", lambda: register(home, tell))
    why = f"passed the gate on dataset {dataset['version']} (decision {decision.number})"
    step("promote", "ledger entry and alias", lambda: promote(home, why, tell))
    answers = step("ask", "the served champion about held-out images", lambda: ask(home, tell)) if ask else []
    return _summarise(workspace, decision, "promoted", seconds, answers)


def ingest(home: str, tell: Tell) -> dict[str, Any]:
    """Pull the declared sources; a workspace without sources keeps the version it has pinned. Return the pin."""
    from visionloop.ingest.pull import pull

    workspace = open_workspace(Path(home))
    pipeline.refresh_code(workspace.settings.home, workspace.params)
    sources = workspace.params.ingest.sources
    if not sources:
        pin = load_pin(workspace.settings.pin_path, workspace.name)
        check_store(workspace)
        load_records(workspace.store, pin)
        tell(f"  no source in params.yaml: dataset {pin.name} stays at version {pin.version}")
        return pin.to_json()
    report = pull(
        workspace,
        sources=sources,
        now=get_now(),
        env=os.environ,
        tell=lambda line: tell(f"  {line}"),
        on_progress=make_log_progress("  checked", "images", tell),
    )
    for line in describe_pull(report):
        tell(f"  {line}")
    return report.pin.to_json()


def run_stage(home: str, stage: str, tell: Tell, tell_more: Tell = lambda line: None) -> str:
    """Run one dvc stage; return ran, skipped or restored."""
    workspace = open_workspace(Path(home))

    def on_line(line: str) -> None:
        if line and LOCK_TABLE not in line and not line.startswith(DVC_CHATTER):
            tell(f"  {line}")
        else:
            tell_more(line)

    result = pipeline.run_stage(workspace.settings, stage, on_line)
    if result.status != "ran":
        words = {"skipped": "nothing it depends on changed", "restored": "made before, restored from dvc's cache"}
        tell(f"  {words[result.status]}")
    return result.status


def gate(home: str, tell: Tell) -> dict[str, Any]:
    """Judge the candidate against the champion; return the decision."""
    from visionloop.promotion.decide import gate as run_gate

    workspace = open_workspace(Path(home))
    settings = workspace.settings
    pin = load_pin(settings.pin_path, workspace.name)
    state = pipeline.compute_state(settings.home, workspace.params, pin.digest, candidate_dir=settings.candidate_dir)
    decision = run_gate(workspace, state=state, now=get_now())
    for line in describe_decision(decision):
        tell(f"  {line}")
    return decision.to_json()


def register(home: str, tell: Tell) -> str:
    """Copy the bundle to the store and mirror it in MLflow; return the model version."""
    from visionloop.promotion.promote import register as run_register

    workspace = open_workspace(Path(home))
    version = run_register(workspace)
    tell(f"  {describe_registered(workspace.name, version)}")
    return version


def promote(home: str, why: str, tell: Tell) -> dict[str, Any]:
    """Write the ledger entry and set MLflow's alias; return the entry."""
    from visionloop.promotion.promote import promote as run_promote

    workspace = open_workspace(Path(home))
    entry = run_promote(workspace, by=get_user(), why=why, now=get_now())
    tell(f"  {describe_champion(entry)}")
    return entry.to_json()


def find_unchanged(workspace: Workspace, dataset: dict[str, Any]) -> Decision | None:
    """Return the last decision if dataset, params, code and champion are still those that it left behind."""
    decision = latest_decision(workspace.store, workspace.name)
    champion = read_champion(workspace.store, workspace.name)
    state = pipeline.compute_state(workspace.settings.home, workspace.params, dataset["digest"])
    if decision is None or decision.state != state:
        return None
    left = decision.candidate if decision.verdict == "passed" else decision.champion
    return decision if left == (champion.bundle if champion else None) else None


def _summarise(
    workspace: Workspace,
    decision: Decision,
    outcome: str,
    seconds: dict[str, float],
    answers: list[dict[str, Any]] | None = None,
) -> Summary:
    """Put together what is told at the end."""
    champion = read_champion(workspace.store, workspace.name)
    is_old_news = outcome == "unchanged" and decision.verdict == "passed"
    return Summary(
        name=workspace.name,
        outcome=outcome,
        headline=describe_outcome(outcome, decision),
        dataset=decision.dataset,
        metrics=decision.metrics,
        verdict=decision.verdict,
        rules=[] if is_old_news else [rule.to_json() for rule in decision.rules],
        model={"version": champion.model_version, "bundle": champion.bundle} if champion else {},
        answers=answers or [],
        step_seconds=seconds,
        commands=_list_next_commands(workspace, has_champion=champion is not None),
    )


def _list_next_commands(workspace: Workspace, *, has_champion: bool) -> dict[str, str]:
    """Return the commands to look further, as they can be pasted into this shell."""
    settings, here = workspace.settings, Path.cwd()
    report = settings.reports_dir / "report.html"
    look = describe_mlflow(settings.tracking_uri, settings.home, here, find_command("mlflow"))
    commands = {"compare runs": look}
    if report.is_file():
        commands["read the report"] = shorten_path(report, settings.home, here)
    if has_champion:
        enter = "" if settings.home == here else f"cd {settings.home} && "
        commands["serve the champion"] = f"{enter}{find_command('visionloop')} serve"
    return commands


def find_command(name: str) -> str:
    """Return how a command of this environment is called here: by its name, or by its path."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) or not beside.is_file():
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
