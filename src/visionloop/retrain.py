"""One retrain, step by step: ingest, the stages of dvc.yaml, gate, register, promote.

`visionloop start` runs the steps as they are; a flow runs each as a task of its own, with retries. Each returns JSON.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from visionloop import pipeline
from visionloop.bundle import find_fault
from visionloop.data.acceptance import describe_unread
from visionloop.data.known_store import check_store, check_store_for_pull
from visionloop.data.manifest import load_pin
from visionloop.data.parts import iterate_records
from visionloop.errors import LeaseHeld, VisionLoopError, describe_install, shorten
from visionloop.promotion.ledger import (
    describe_rollback,
    find_rolled_back,
    is_bound,
    latest_decision,
    read_champion,
    read_history,
)
from visionloop.promotion.restore import require_whole
from visionloop.records import Decision, LedgerEntry
from visionloop.runs import as_one_run, close_left_runs, note_verdict
from visionloop.store.lease import Lease, make_claim, take_lease
from visionloop.words import (
    Summary,
    describe_champion,
    describe_decision,
    describe_mlflow,
    describe_pull,
    describe_registered,
    make_log_progress,
    shorten_path,
)
from visionloop.workspace import Workspace, get_now, get_user, open_workspace

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Scheduled:
    """A run as its scheduler knows it. `close` closes another one there, which died; False: it was closed already."""

    run: str
    close: Callable[[str], bool]


RunStep = Callable[[str, Callable[[], Any]], Any]
# What dvc itself says around a stage's own lines, and the stage's error, which is raised and told.
DVC_CHATTER = (
    *("Running stage", "Data and pipelines", "> ", "Updating lock", "Generating lock", "Use `dvc push`", "To "),
    *("WARNING: 'features' is empty", "WARNING: 'reports/training' is empty"),
    *("\tgit", "\tdvc", "Stage '", "ERROR: failed to reproduce", "error: "),
)
FEWER_ANSWERS = 0.1  # of the test images, than the champion: from here on it is told
LOCK_TABLE = "RWLock-file"  # dvc says in several lines that it has taken a killed process out of its table of locks


def bring_up_to_date(
    workspace: Workspace,
    *,
    tell: Tell,
    run_step: RunStep = lambda name, work: work(),
    ask: Callable[[str, Tell], list[dict[str, Any]]] | None = None,
    tell_more: Tell = lambda line: None,
    scheduled: Scheduled | None = None,
) -> Summary:
    """Do the steps one by one, as far as they lead, and return what came of them: one retrain of a name at a time.

    `run_step` runs a step by its name; `ask` is a last one, that asks the served champion; `tell_more` gets dvc's own
    lines; `scheduled` is the run as its scheduler knows it.

    Raises:
        LeaseHeld: another retrain of this name is under way; nothing has moved.
        LeaseLost: another one has taken over from this one, which was thought dead; nothing was promoted.
        VisionLoopError: what the steps raise.
    """
    run = scheduled.run if scheduled else ""
    lease = run_step("lease", lambda: try_to_take_lease(workspace, tell, run))
    if isinstance(lease, LeaseHeld):
        raise lease
    with lease:
        _close_died(workspace, lease, scheduled, tell)
        return _do_steps(workspace, lease, tell=tell, run_step=run_step, ask=ask, tell_more=tell_more)


def try_to_take_lease(workspace: Workspace, tell: Tell, run: str = "") -> Lease | LeaseHeld:
    """Return the lease of this name, or why it cannot be had: that is an answer, and no failed step.

    `run` is what its scheduler calls this run.

    Raises:
        StoreError: this is not the store that the workspace knows; it gets no lease either.
    """
    check_store_for_pull(workspace)
    try:
        return take_lease(workspace.store, workspace.name, make_claim(get_user(), get_now(), run=run), tell=tell)
    except LeaseHeld as exc:
        return exc


def _do_steps(
    workspace: Workspace,
    lease: Lease,
    *,
    tell: Tell,
    run_step: RunStep,
    ask: Callable[[str, Tell], list[dict[str, Any]]] | None,
    tell_more: Tell,
) -> Summary:
    home = str(workspace.settings.home)
    stages = pipeline.read_stage_names(workspace.settings.home)
    seconds: dict[str, float] = {}
    total = len(stages) + 4 + (ask is not None)

    def step(name: str, what: str, work: Callable[[], Any]) -> Any:
        tell(f"[{len(seconds) + 1}/{total}] {name}: {what}")
        started = time.perf_counter()
        result = run_step(name, lambda: _under(lease, work))
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    dataset = step("ingest", "new images into the store", lambda: ingest(home, tell))
    if unchanged := find_unchanged(workspace, dataset):
        tell(describe_unchanged(unchanged))
        if fault := find_fault(workspace.settings.candidate_dir):
            tell(fault)
        if rollback := _find_rollback(workspace, unchanged):
            tell(f"bundle {unchanged.candidate[:12]} was {describe_rollback(rollback)}; it stays down")
        return _summarise(workspace, unchanged, "unchanged", seconds)
    with as_one_run(workspace, dataset) as parent:
        for stage in stages:
            step(stage, "dvc stage", partial(run_stage, home, stage, tell, tell_more, parent, lease=lease))
    decision = Decision.from_json(step("gate", "candidate against champion", lambda: gate(home, tell)))
    note_verdict(workspace, parent, decision)
    if decision.is_same_model:
        require_whole(workspace.store, decision.candidate)
        return _summarise(workspace, decision, "same", seconds)
    if decision.verdict != "passed":
        return _summarise(workspace, decision, decision.verdict, seconds)
    step("register", "bundle to the store and to MLflow", lambda: register(home, tell))
    why = f"passed the gate on dataset {dataset['version']} (decision {decision.number})"
    step("promote", "ledger entry and alias", lambda: promote(home, why, tell, lease))
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
        deque(iterate_records(workspace.store, pin), maxlen=0)  # checks them
        tell(f"  no source in params.yaml: dataset {pin.name} stays at version {pin.version}")
        for line in describe_unread(workspace.store, workspace.name, workspace.params.review, ()):
            tell(f"  {line}")
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


def run_stage(
    home: str,
    stage: str,
    tell: Tell,
    tell_more: Tell = lambda line: None,
    parent_run: str | None = None,
    *,
    lease: Lease | None = None,
) -> str:
    """Run one dvc stage, its runs in MLflow nested under `parent_run`; return ran, skipped or restored.

    It is stopped when the lease is lost: whoever has it trains, too.
    """
    workspace = open_workspace(Path(home))

    def on_line(line: str) -> None:
        if line and LOCK_TABLE not in line and not line.startswith(DVC_CHATTER):
            tell(f"  {line}")
        else:
            tell_more(line)

    def on_start(process: "subprocess.Popen[str]") -> None:
        if lease:
            lease.stop_when_lost(process.terminate)

    result = pipeline.run_stage(workspace.settings, stage, on_line, parent_run=parent_run, on_start=on_start)
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
    """Try the candidate in the real server, copy it to the store and mirror it in MLflow; return the model version."""
    from visionloop.promotion.promote import register as run_register
    from visionloop.serving.check import check_serving

    workspace = open_workspace(Path(home))
    if importlib.util.find_spec("fastapi"):
        number = check_serving(workspace, str(workspace.settings.candidate_dir))
        tell(f"  the server, tried on a port of its own, answers {number} golden images as the bundle does")
    else:
        tell(f"  the server was not tried: it is not installed here (`{describe_install('serve')}`)")
    version = run_register(workspace)
    tell(f"  {describe_registered(workspace.name, version)}")
    return version


def promote(home: str, why: str, tell: Tell, lease: Lease) -> dict[str, Any]:
    """Write the ledger entry and set MLflow's alias; return the entry. Raises LeaseLost."""
    from visionloop.promotion.promote import promote as run_promote

    workspace = open_workspace(Path(home))
    entry = run_promote(workspace, by=get_user(), why=why, now=get_now(), lease=lease)
    tell(f"  {describe_champion(entry)}")
    return entry.to_json()


def find_unchanged(workspace: Workspace, dataset: dict[str, Any]) -> Decision | None:
    """Return the last decision if dataset, params, code and champion are still those that it left behind.

    A model that passed and was rolled back from since is still what this state leads to: it stays down.

    Raises:
        BundleError: nothing changed, but the champion's bundle is damaged in the store.
    """
    decision = latest_decision(workspace.store, workspace.name)
    state = pipeline.compute_state(workspace.settings.home, workspace.params, dataset["digest"])
    if decision is None or decision.state != state:
        return None
    champion = read_champion(workspace.store, workspace.name)
    if decision.verdict == "passed":
        is_champion = champion is not None and decision.candidate == champion.bundle
        stands = is_champion or _find_rollback(workspace, decision) is not None
    else:
        stands = is_bound(decision, champion)
    if stands and champion:
        require_whole(workspace.store, champion.bundle)
    return decision if stands else None


def _find_rollback(workspace: Workspace, decision: Decision) -> LedgerEntry | None:
    """Return the rollback from a decision's candidate, if it still holds."""
    return find_rolled_back(read_history(workspace.store, workspace.name), decision.candidate)


def describe_outcome(outcome: str, decision: Decision) -> str:
    """Tell in one line what came of a retrain."""
    return {
        "promoted": f"{decision.name} has a new champion",
        "unchanged": f"{describe_unchanged(decision)}; nothing moved",
        "same": f"the candidate is the champion of {decision.name} itself; nothing moved",
        "refused": "the candidate was refused at the gate; nothing moved",
        "inconclusive": "the gate cannot tell whether the candidate is good enough; nothing moved",
        "waiting": f"decision {decision.number} waits for `visionloop approve`; nothing moved",
    }[outcome]


def describe_answered(decision: Decision) -> dict[str, str]:
    """Say how many test images candidate and champion answer, if either may say "don't know"; LOOK at a large fall."""
    found = [metrics.get("answered") for metrics in (decision.metrics, decision.champion_metrics)]
    share, before = (1.0 if one is None else one["value"] or 0.0 for one in found)
    if not any(found):
        return {}
    rows = {
        "candidate answers": f"{100 * share:.2f} % of the photos; accuracy counts its best guess for the others too"
    }
    if decision.champion_metrics:
        rows["candidate answers"] += f"; the champion that it was compared with: {100 * before:.2f} %"
        if before - share > FEWER_ANSWERS:
            rows["LOOK"] = f"it answers {100 * (before - share):.0f} points fewer of the photos (train.abstain)"
    return rows


def describe_unchanged(decision: Decision) -> str:
    """Tell that there is nothing to retrain for since a decision; one against the candidate still stands."""
    is_good = decision.verdict == "passed" or decision.is_same_model
    stands = "" if is_good else f"; decision {decision.number} stands: {decision.verdict}"
    return f"nothing changed: dataset {decision.dataset['version']}, params, code{stands}"


def _under(lease: Lease, work: Callable[[], Any]) -> Any:
    """Do the work of a step. Raises LeaseLost, if the lease is lost, rather than what came of that."""
    lease.require_held()
    try:
        return work()
    except Exception:
        lease.require_held()
        raise


def _close_died(workspace: Workspace, lease: Lease, scheduled: Scheduled | None, tell: Tell) -> None:
    """Close the runs of the retrains that died, in MLflow and with their scheduler: they could not do it themselves.

    What cannot be closed now is left for the next retrain.
    """
    for claim in lease.died:
        tell(f"a retrain was ended before it could close its runs: {claim}")
    try:
        closed = close_left_runs(workspace) if lease.died else []
        if closed:
            tell(f"  closed in MLflow, as killed: {shorten(closed)}")
        for claim in lease.died:
            if scheduled and claim.run and scheduled.close(claim.run):
                tell(f"  closed by the scheduler, as crashed: run {claim.run}")
            if scheduled or not claim.run:
                lease.forget(claim)
    except VisionLoopError as exc:
        tell(f"  not closed, the next retrain tries again: {exc}")


def _summarise(
    workspace: Workspace,
    decision: Decision,
    outcome: str,
    seconds: dict[str, float],
    answers: list[dict[str, Any]] | None = None,
) -> Summary:
    """Put together what is told at the end."""
    champion = read_champion(workspace.store, workspace.name)
    is_old_news = outcome == "unchanged" and (decision.verdict == "passed" or decision.is_same_model)
    return Summary(
        name=workspace.name,
        outcome=outcome,
        headline=describe_outcome(outcome, decision),
        dataset=decision.dataset,
        metrics=decision.metrics,
        answered=describe_answered(decision),
        verdict="same" if decision.is_same_model else decision.verdict,
        rules=[] if is_old_news else [rule.to_json() for rule in decision.rules],
        model={"version": champion.model_version, "bundle": champion.bundle} if champion else {},
        answers=answers or [],
        step_seconds=seconds,
        commands=_list_next_commands(workspace, has_champion=champion is not None),
    )


def _list_next_commands(workspace: Workspace, *, has_champion: bool) -> dict[str, str]:
    """Return the commands to look further, as they can be pasted into this shell."""
    settings, here = workspace.settings, Path.cwd()
    report = settings.decisions_dir / "latest.html"
    look = describe_mlflow(settings.tracking_uri, settings.home, here, find_command("visionloop", settings.home))
    commands = {"compare runs": look}
    if report.is_file():
        commands["read the report"] = shorten_path(report, settings.home, here)
    if has_champion:
        enter = "" if settings.home == here else f"cd {settings.home} && "
        commands["serve the champion"] = f"{enter}{find_command('visionloop', settings.home)} serve"
    return commands


def find_command(name: str, folder: Path | None = None) -> str:
    """Return how a command of this environment is called in a folder (None: here): by its name, or by its path."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) or not beside.is_file():
        return name
    folder = folder or Path.cwd()
    return str(beside.relative_to(folder) if beside.is_relative_to(folder) else beside)
