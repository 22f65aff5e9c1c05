"""The state of the loop: dataset, champion, verdicts, what is served, what comes next. Read from store and Prefect.

Each section is read alone: one that cannot be read is told among the problems, and the others stand.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from visionloop.data.answers import load_batches
from visionloop.data.known_store import check_store
from visionloop.data.manifest import load_pin, load_version
from visionloop.data.prediction_log import read_requests
from visionloop.errors import DatasetError, VisionLoopError, describe_first_line
from visionloop.monitoring.ask import measure_progress
from visionloop.monitoring.due import read_decisions as read_trigger_decisions
from visionloop.monitoring.judge import Verdict
from visionloop.monitoring.watch import list_unsent, list_windows, load_verdict
from visionloop.promotion.ledger import describe_by_person, read_champion, read_decisions
from visionloop.records import Decision, LedgerEntry, Record, make_natural_key
from visionloop.secrets import mask
from visionloop.store.lease import read_holder
from visionloop.up.parts import ask
from visionloop.words import describe_error
from visionloop.workspace import Workspace

SHOWN_DECISIONS, SHOWN_RUNS, MAX_RUNS = 12, 5, 60
KEPT_BATCHES = 2  # the newest that are still asked about: of the log, and of suspicious labels
FIGURES = ("accuracy", "macro_f1", "map", "exact_match")
FROM_STORE = (  # fields of an overview
    *("dataset", "champion", "decisions", "window", "trigger"),
    *("waiting", "waiting_since", "unsent", "under_way", "under_way_since"),
)


@dataclass(frozen=True)
class Overview(Record):
    """What is known of a loop at one time, JSON-ready. None: there is none of it yet, or it cannot be read.

    `decisions` are the newest of the gate, the oldest of them first. `waiting`: images that wait for a label, the
    first of them since `waiting_since`. `unsent`: alerts that the webhook has not taken yet. `unread`: the fields that
    could not be read.
    """

    name: str
    home: str
    at: str
    dataset: dict[str, Any] | None = None
    champion: dict[str, Any] | None = None
    decisions: tuple[dict[str, Any], ...] = ()
    window: dict[str, Any] | None = None
    trigger: dict[str, Any] | None = None
    under_way: str = ""
    under_way_since: str = ""
    plan: dict[str, Any] | None = None
    waiting: int | None = None
    waiting_since: str = ""
    unsent: int | None = None
    problems: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The last decision of the gate."""
        return self.decisions[-1] if self.decisions else None


def read_overview(workspace: Workspace, *, now: datetime, prefect_api: str | None = None) -> Overview:
    """Read all of it. Takes as long as the store takes; raises nothing."""
    problems: list[str] = []
    unread: list[str] = []
    store, name = workspace.store, workspace.name

    def read(what: str, work: Callable[[], Any], *fields: str) -> Any:
        try:
            return work()
        except VisionLoopError as exc:
            problems.append(describe_error(exc).removeprefix("error: "))
        except Exception as exc:  # a record that somebody has damaged
            problems.append(f"{what} cannot be read: {type(exc).__name__}: {describe_first_line(exc)}")
        unread.extend(fields)
        return None

    facts: dict[str, Any] = {"name": name, "home": str(workspace.settings.home), "at": now.isoformat()}
    read("the store", lambda: _check_store(workspace), *FROM_STORE)
    if not problems:
        found = read("the decisions", lambda: read_decisions(store, name, SHOWN_DECISIONS), "decisions") or []
        facts["dataset"] = read("the dataset", lambda: _read_dataset(workspace), "dataset")
        entry = read("the ledger", lambda: read_champion(store, name), "champion")
        told = read("the decisions", lambda: [_tell_decision(one, entry) for one in found], "decisions")
        champion = read("the champion", lambda: _tell_champion(entry, found) if entry else None, "champion")
        facts |= {"decisions": tuple(told or ()), "champion": champion}
        facts["window"] = read("the last window", lambda: _read_window(workspace, now), "window")
        facts["trigger"] = read("the triggers", lambda: _read_trigger(workspace), "trigger")
        asked = read("the review", lambda: _count_waiting(workspace), "waiting", "waiting_since")
        facts["waiting"], facts["waiting_since"] = asked or (None, "")
        facts["unsent"] = read("the alerts", lambda: len(list_unsent(workspace)), "unsent")
        if holder := read("the lease", lambda: read_holder(store, name), "under_way", "under_way_since"):
            facts["under_way"] = str(replace(holder, started_at=""))
            facts["under_way_since"] = holder.started_at
    facts["plan"] = read("Prefect", lambda: read_plan(workspace, prefect_api, now)) if prefect_api else None
    told_once = tuple(dict.fromkeys(mask(one) for one in problems))
    return Overview(**facts, problems=told_once, unread=tuple(dict.fromkeys(unread)))


def _check_store(workspace: Workspace) -> None:
    """Raise StoreError for a store that is away or another one: what it holds would tell of another loop."""
    with contextlib.suppress(DatasetError):  # a damaged pin: the dataset's section tells it
        check_store(workspace)


def _read_dataset(workspace: Workspace) -> dict[str, Any] | None:
    if not workspace.settings.pin_path.is_file():
        return None
    pin = load_pin(workspace.settings.pin_path, workspace.name)
    version = load_version(workspace.store, pin.name, pin.version)
    counts: dict[str, int] = {}
    for classes in version.counts.values():
        for label, number in classes.items():
            counts[label] = counts.get(label, 0) + number
    return {
        "version": pin.version,
        "num_images": pin.num_images,
        "num_added": version.num_added,
        "num_rejected": version.num_rejected,
        "at": version.created_at,
        "sides": {side: sum(classes.values()) for side, classes in version.counts.items()},
        "classes": [[label, counts.get(label, 0)] for label in sorted(pin.classes, key=make_natural_key)],
    }


def _tell_champion(entry: LedgerEntry, decisions: list[Decision]) -> dict[str, Any]:
    known = next((one for one in decisions if one.number == entry.decision), None)
    return {
        "bundle": entry.bundle,
        "entry": entry.number,
        "version": entry.model_version,
        "action": entry.action,
        "at": entry.at,
        "by": entry.by,
        "why": entry.why,
        "dataset": entry.dataset.get("version"),
        "figure": _pick_figure(known.metrics) if known else None,
    }


def _tell_decision(decision: Decision, entry: LedgerEntry | None) -> dict[str, Any]:
    held = [one for one in decision.rules if one.holds_back]
    return {
        "number": decision.number,
        "verdict": "same" if decision.is_same_model else decision.verdict,
        "by_person": describe_by_person(decision, entry),
        "at": decision.decided_at,
        "candidate": decision.candidate,
        "dataset": decision.dataset.get("version"),
        "held": [f"{one.rule}: {one.found}" for one in held],
        "figure": _pick_figure(decision.metrics),
    }


def _pick_figure(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any] | None:
    """Return the figure that a person asks for first, with its bounds."""
    name = next((one for one in FIGURES if one in metrics), None)
    if name is None or metrics[name].get("value") is None:
        return None
    low, high = (metrics[name].get(bound) for bound in ("low", "high"))
    return {"name": name, "value": metrics[name]["value"], "low": low, "high": high}


def _read_window(workspace: Workspace, now: datetime) -> dict[str, Any] | None:
    """Return the newest window that was judged."""
    for window in reversed(list_windows(workspace)[-3:]):
        if verdict := load_verdict(workspace, window):
            counts = read_requests(workspace.store, workspace.name, datetime.fromisoformat(verdict.end), now)
            answered = counts.total - counts.refused - counts.errors if counts else 0
            is_planned = workspace.params.schedule.monitor is not None  # as `up` and `flows/deploy.py` do
            return {**_tell_window(verdict), "since": answered, "is_planned": is_planned}
    return None


def _tell_window(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.verdict,
        "is_alert": verdict.is_alert,
        "start": verdict.start,
        "end": verdict.end,
        "num_images": verdict.num_images,
        "p": verdict.p,
        "level": verdict.level,
        "expected": verdict.expected_accuracy,
        "expected_is_trusted": verdict.expected_is_trusted,
        "labelled": dict(verdict.labelled_accuracy) if verdict.labelled_accuracy else None,
        "num_labels": verdict.num_labels,
        "alerts": [f"{check['name']}: {check['found']}" for check in verdict.list_alerts()],
        "checks": [{key: check.get(key) for key in ("name", "kind", "state", "line")} for check in verdict.checks],
    }


def _count_waiting(workspace: Workspace) -> tuple[int, str] | None:
    """Count the images of open batches that nobody has answered, and say since when; None: nobody was asked yet."""
    if not (batches := load_batches(workspace.store, workspace.name)[-KEPT_BATCHES:]):
        return None
    each = [(measure_progress(workspace, batch), batch.at) for batch in batches]
    return sum(one.num_images - one.num_answered for one, _ in each), min(
        (at for one, at in each if not one.is_done), default=""
    )


def _read_trigger(workspace: Workspace) -> dict[str, Any] | None:
    if not (found := read_trigger_decisions(workspace.store, workspace.name, 1)):
        return None
    return {"outcome": found[0].outcome, "why": found[0].why, "at": found[0].at}


def read_plan(workspace: Workspace, api: str, now: datetime) -> dict[str, Any] | None:
    """Return what Prefect runs next, what it runs now and what has ended last; None: it does not answer.

    Of this workspace alone, also the runs that somebody has started from a shell.
    """
    tags = {"tags": {"all_": ["visionloop", workspace.name]}}
    deployments = ask(f"{api}/deployments/filter", {"deployments": tags})
    flows = ask(f"{api}/flows/filter", {})
    if not isinstance(deployments, list) or not isinstance(flows, list):
        return None
    names, flow_names = ({one["id"]: str(one["name"]) for one in rows} for rows in (deployments, flows))
    home = str(workspace.settings.home)

    def find(states: list[str], sort: str, most: int) -> list[dict[str, Any]]:
        query = {"flow_runs": {"state": {"type": {"any_": states}}}, "sort": sort, "limit": MAX_RUNS}
        found = [
            {
                "name": f"{flow_names.get(one['flow_id'], 'a flow')}/{names.get(one['deployment_id'], 'from a shell')}",
                "state": one["state_name"],
                "kind": one["state_type"],
                "at": one.get("end_time") or one.get("start_time") or one.get("expected_start_time"),
                "url": f"{api.removesuffix('/api')}/runs/flow-run/{one['id']}",
            }
            for one in ask(f"{api}/flow_runs/filter", query) or []
            if (one.get("parameters") or {}).get("workspace") == home
        ]
        return found[:most]

    planned = find(["SCHEDULED"], "EXPECTED_START_TIME_ASC", MAX_RUNS)
    return {
        "next": [one for one in planned if (at := parse_time(one["at"])) and at >= now][:3],
        "running": find(["RUNNING", "PENDING"], "START_TIME_DESC", 3),
        "ended": find(["COMPLETED", "FAILED", "CRASHED", "CANCELLED"], "END_TIME_DESC", SHOWN_RUNS),
    }


def parse_time(text: Any) -> datetime | None:
    """Return a time of a record, which is of UTC where it names no zone; None: it is none."""
    try:
        time = datetime.fromisoformat(str(text))
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def advise(overview: Overview) -> tuple[str, str]:
    """Return what a person does next, and the command for it; both "" where nothing is to be done."""
    window, verdict, dataset = overview.window, overview.verdict, overview.dataset
    is_changed = window is not None and window["verdict"] in ("drift", "quality")
    has_none = overview.champion is None and not overview.problems
    changed = "What is served is no longer like what was learned. New images with labels, then:"
    wait = "image waits" if overview.waiting == 1 else "images wait"
    advice = (
        (
            has_none and not dataset,
            "There are no images yet. A folder a class is enough:",
            "ingest PHOTOS --save",
        ),
        (has_none and not verdict, "The images are here, and no model yet:", "start"),
        (verdict and verdict["verdict"] == "waiting", "A candidate waits for a person's word:", "approve --why WHY"),
        (has_none, "No candidate has passed the gate yet. More images, or other params, then:", "retrain"),
        (overview.waiting, f"{overview.waiting or 0:,} {wait} for a label:", "review --serve"),
        (is_changed, changed, "retrain"),
    )
    if overview.under_way or (overview.plan and overview.plan["running"]):
        return "", ""
    return next(((text, f"visionloop {command}") for holds, text, command in advice if holds), ("", ""))
