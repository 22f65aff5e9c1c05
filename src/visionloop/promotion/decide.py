"""The stage `gate`: candidate against champion on the same test side. Stores its decision, changes no champion.

The answers of both models are in `score.py`, what is made of them in `judge.py`, the rules in `gate.py`. `approve` adds
a person's word to a decision that waits for it: as a decision of its own, so that every step after it reads the same.
`compare_models` asks any two models, and stores nothing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from visionloop.bundle import download_bundle, load_run_note
from visionloop.data.known_store import check_store
from visionloop.data.leaks import load_leaks
from visionloop.data.manifest import load_pin, load_version
from visionloop.data.parts import iterate_records
from visionloop.errors import BundleError, DatasetError, PromotionError, VisionLoopError
from visionloop.evaluation.baselines import Baseline
from visionloop.evaluation.resampling import code_keys, count_keys
from visionloop.predictor import Predictor
from visionloop.promotion.evidence import Asked, collect_facts, write_approval, write_report
from visionloop.promotion.gate import (
    APPROVABLE,
    WAITING,
    approve_rules,
    compute_verdict,
    make_approval_rule,
    make_broken_rule,
    make_task_rule,
)
from visionloop.promotion.judge import Case, Metrics, align, judge
from visionloop.promotion.ledger import (
    check_rolled_back,
    latest_decision,
    read_champion,
    read_decision,
    read_decisions_about,
    read_ledger,
    store_decision,
    write_decision,
)
from visionloop.promotion.limits import check_latency, check_limit, check_simple_heads
from visionloop.promotion.models import load_candidate, require_no_training
from visionloop.promotion.report import RetrainFacts
from visionloop.promotion.score import (
    Scores,
    compute_engine_digest,
    compute_test_digest,
    measure_latency,
    score_bundle,
    select_test,
)
from visionloop.records import Card, Decision, ImageRecord, Interval, LedgerEntry, Pin, RuleResult
from visionloop.tracking_pages import make_verdict_tags
from visionloop.workspace import Workspace

Score = Callable[[Predictor], Scores]


@dataclass(frozen=True)
class Rival:
    """The champion, as far as it can be asked here: its model and answers, or why there are none."""

    is_candidate: bool = False
    model: Predictor | None = None
    scores: Scores | None = None
    broken: str = ""


def gate(
    workspace: Workspace,
    *,
    state: dict[str, str],
    now: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decision:
    """Judge models/candidate against the champion; store the decision and tag the candidate's MLflow run.

    With unchanged inputs a second run returns the stored decision. `state` and `now` are stored as given.

    Raises:
        DatasetError: no test image, or the candidate was trained on another dataset version.
        BundleError: the candidate is damaged, or answers differently here.
        BusyError: there is no such candidate, because a training is running.
        StoreError: the store cannot be read, or is not the one that the workspace knows.
        TrackingError: MLflow cannot be tagged; the decision is stored by then.
    """
    settings, store, name = workspace.settings, workspace.store, workspace.name
    check_store(workspace)
    pin = load_pin(settings.pin_path, workspace.name)
    candidate = _load_candidate(workspace, pin)
    tests = _load_tests(workspace, pin)
    score = partial(score_bundle, store, tests=tests, on_progress=on_progress)
    scores, ledger = score(candidate), read_ledger(store, name)
    champion = ledger.champion
    rival = _ask_champion(workspace, champion, candidate, score) if champion else None
    earlier, asked_on = read_decisions_about(store, name, champion), _describe_tests(pin, tests)
    looks, on_these = _count_looks(earlier, champion, candidate.digest, asked_on["test_digest"])
    is_champion, rival_scores = rival is not None and rival.is_candidate, rival.scores if rival else None
    is_broken = bool(rival and rival.broken)
    case = Case(workspace.params, tests, scores, rival_scores, is_champion, looks, on_these, is_broken)
    rules, metrics = judge(case)
    if rolled_back := check_rolled_back(store, ledger.entries, candidate.bundle):
        rules.insert(0, rolled_back)
    rules = [*_note_champion(candidate, rival), *rules, *_check_limits(workspace, pin, tests, candidate, rival)]
    note = load_run_note(settings.runs_dir, candidate.digest)
    decision = Decision(
        name=name,
        number=0,
        verdict="",
        candidate=candidate.digest,
        champion=champion.bundle if champion else None,
        **asked_on,
        rules=tuple(rules),
        metrics=_to_json(metrics[0]),
        champion_metrics=_to_json(metrics[-1]) if rival and not rival.broken else {},
        state=dict(state),
        run_id=note.run_id if note else None,
        decided_at=now,
        entry=champion.number if champion else 0,
        looks=looks,
    )
    kept = _keep_approval(earlier, decision)
    models = [(model.digest, model.card) for model in (candidate, rival.model if rival else None) if model]
    write_page = partial(write_report, workspace, asked=Asked(tests, align(case), models), champion=champion)
    return _conclude(workspace, replace(decision, rules=kept, verdict=compute_verdict(kept)), write_page)


def compare_models(
    workspace: Workspace,
    models: tuple[Predictor, Predictor],
    names: tuple[str, str],
    *,
    now: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RetrainFacts:
    """Let two models answer the test side of the pinned version; the first is judged as if it were a candidate.

    Raises:
        DatasetError: no test image. PromotionError: it is one model twice, or they are of different names.
    """
    one, other = models
    if one.digest == other.digest:
        raise PromotionError(f"{names[0]} and {names[1]}", f"are one model ({one.digest[:12]})", "two models")
    pin = load_pin(workspace.settings.pin_path, workspace.name)
    tests = _load_tests(workspace, pin)
    score = partial(score_bundle, workspace.store, tests=tests, on_progress=on_progress)
    case = Case(params=workspace.params, tests=tests, candidate=score(one), champion=score(other))
    rules, metrics = judge(case)
    decision = Decision(
        name=workspace.name,
        number=0,
        verdict=compute_verdict(rules),
        candidate=one.digest,
        champion=other.digest,
        **_describe_tests(pin, tests),
        rules=tuple(rules),
        metrics=_to_json(metrics[0]),
        champion_metrics=_to_json(metrics[1]),
        state={},
        run_id=None,
        decided_at=now,
    )
    cards = [(model.digest, model.card) for model in models]
    return replace(collect_facts(workspace, decision, Asked(tests, align(case), cards), None), names=names)


def approve(workspace: Workspace, *, number: int | None, by: str, why: str, now: str) -> Decision:
    """Let a candidate pass that waits for a person: store and return a new decision that says who and why.

    Raises:
        PromotionError: there is no such decision, it does not wait, or is out of date: about this candidate there is a
            newer one, or the champion moved.
        TrackingError: MLflow cannot be tagged; the decision is stored by then.
    """
    store, name = workspace.store, workspace.name
    decision = latest_decision(store, name) if number is None else read_decision(store, name, number)
    if decision is None:
        found = "has no decision" if number is None else f"has no decision {number}"
        raise PromotionError(f"decisions {name}", found, "one that waits", "Run `visionloop gate`.")
    where = f"decision {decision.number} of {name}"
    if decision.verdict != WAITING:
        raise PromotionError(
            where,
            f"is {decision.verdict}",
            f"one that is {WAITING}: only what a person may say can be approved",
            "See decisions/latest.json and `docs/judging.md`.",
        )
    newest, champion = latest_decision(store, name, candidate=decision.candidate), read_champion(store, name)
    if newest and newest.number != decision.number:
        found = f"is not the newest about its candidate: decision {newest.number} is ({newest.verdict})"
        raise PromotionError(where, found, "the newest", "See `visionloop gate`.")
    if decision.entry != (champion.number if champion else 0):
        found = f"compared with ledger entry {decision.entry}, and the champion moved"
        raise PromotionError(where, found, "the champion that the gate saw", "Run `visionloop gate` again.")
    rules = approve_rules(decision.rules, by, why)
    passed = replace(decision, rules=rules, verdict=compute_verdict(rules), decided_at=now)
    return _conclude(workspace, passed, partial(write_approval, workspace, waited=decision))


def _conclude(workspace: Workspace, decision: Decision, write_page: Callable[[Decision], Path | None]) -> Decision:
    """Store a decision, copy it into the workspace with its page, and tag the candidate's run."""
    decision = store_decision(workspace.store, decision)
    write_decision(workspace.settings.decisions_dir, decision)
    page = write_page(decision)
    if decision.run_id:
        if page:
            workspace.tracking.log_artifact(decision.run_id, page, "decision")
        known = workspace.tracking.load_run(decision.run_id).tags
        workspace.tracking.set_tags(decision.run_id, make_verdict_tags(decision, known))
    return decision


def _ask_champion(workspace: Workspace, entry: LedgerEntry, candidate: Predictor, score: Score) -> Rival:
    """Let the champion answer. What is wrong with its bundle or on this machine is a reason, not an error."""
    if entry.bundle == candidate.digest:
        return Rival(is_candidate=True)
    try:
        bundle = download_bundle(workspace.store, entry.bundle, workspace.settings.hidden_dir / "bundles")
        model = Predictor(bundle)
        model.check_golden()
        return Rival(model=model, scores=score(model))
    except BundleError as exc:
        return Rival(broken=f"{exc.where} {exc.found}")


def _note_champion(candidate: Predictor, rival: Rival | None) -> list[RuleResult]:
    """Return the rules about the champion itself."""
    if rival and rival.broken:
        return [make_broken_rule(rival.broken)]
    tasks = [candidate.card.task, rival.model.card.task if rival and rival.model else candidate.card.task]
    return [make_task_rule(*tasks)] if len(set(tasks)) > 1 and "multilabel" in tasks else []


def _check_limits(
    workspace: Workspace, pin: Pin, tests: Sequence[ImageRecord], candidate: Predictor, rival: Rival | None
) -> list[RuleResult]:
    """Apply the rules about data, size, time and approval, which need more than answers."""
    section, rules = workspace.params.gate, []
    if heads := check_simple_heads(_load_baselines(workspace, candidate.digest), section):
        rules.append(heads)
    if section.leaks.mode != "off":
        leaks = load_leaks(workspace.store, load_version(workspace.store, pin.name, pin.version)).rows
        across = {sha256 for leak in leaks if leak.kind == "across" for sha256 in (leak.sha256, leak.other)}
        leaked = sum(record.sha256 in across for record in tests)
        if leaked or section.leaks.mode == "on":
            unit = "test images with a near duplicate on another side"
            rules.append(check_limit("leaks", leaked, section.leaks.most, unit, section.leaks.mode))
    if section.model_size and section.model_size.mode != "off":
        size_mb = (candidate.bundle.folder / "model.onnx").stat().st_size / 1e6
        rules.append(check_limit("model_size", size_mb, section.model_size.mb, "MB", section.model_size.mode))
    if section.latency and section.latency.mode != "off":
        champion = rival.model if rival else None
        rules.append(check_latency(*_recall_latency(workspace, candidate, champion), section.latency))
    if section.approval == "required":
        rules.append(make_approval_rule())
    return rules


def _load_baselines(workspace: Workspace, digest: str) -> list[Baseline] | None:
    """Return the baselines that `evaluate` found for this candidate; None if its report is of another one, or gone."""
    try:
        report = json.loads((workspace.settings.reports_dir / "intervals.json").read_text(encoding="utf-8"))
        if report["bundle"] != digest:
            return None
        rows = report["baselines"]
        return [Baseline(r["name"], *(Interval.from_json(r[part]) for part in ("accuracy", "gain"))) for r in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _recall_latency(
    workspace: Workspace, candidate: Predictor, champion: Predictor | None
) -> tuple[float, float | None]:
    """Measure candidate and champion in turns; once in a workspace, so that a second gate finds the same numbers."""
    models = [candidate, *([champion] if champion else [])]
    name = "-".join([*(model.digest[:16] for model in models), compute_engine_digest()[:12]])
    path = workspace.settings.hidden_dir / "latency" / f"{name}.json"
    try:
        times = [float(each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        times = []
    if len(times) != len(models):
        times = measure_latency(models)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(times), encoding="utf-8")
    return times[0], times[1] if champion else None


def _count_looks(
    earlier: Sequence[Decision], champion: LedgerEntry | None, candidate: str, test_digest: str
) -> tuple[int, int]:
    """Return how many candidates were compared with the champion's entry, this one included; and on these images.

    `earlier` are the decisions about this entry. A candidate that was judged before keeps its place.
    """
    if champion is None or champion.bundle == candidate:
        return 0, 0
    digests: dict[str, bool] = {}
    for one in earlier:
        if one.candidate != champion.bundle:
            digests[one.candidate] = digests.get(one.candidate, False) or one.test_digest == test_digest
    digests[candidate] = True
    order = list(digests)[: list(digests).index(candidate) + 1]
    return len(order), sum(digests[digest] for digest in order)


def _keep_approval(earlier: Sequence[Decision], decision: Decision) -> tuple[RuleResult, ...]:
    """Return the decision's rules with what a person has allowed for this candidate, champion and test side."""
    for one in reversed(earlier):
        is_same = (one.candidate, one.entry, one.test_digest) == (
            decision.candidate, decision.entry, decision.test_digest,
        )  # fmt: skip
        allowed = {r.rule: r for r in one.rules if r.rule in APPROVABLE and r.passed} if is_same else {}
        if allowed:
            return tuple(allowed.get(r.rule, r) if r.passed is None else r for r in decision.rules)
    return decision.rules


def _load_tests(workspace: Workspace, pin: Pin) -> list[ImageRecord]:
    with_negatives = workspace.params.prepare.unlabelled == "negative"
    tests = select_test(iterate_records(workspace.store, pin), with_negatives=with_negatives)
    if not tests:
        where = f"dataset {pin.name} version {pin.version}"
        raise DatasetError(where, "has no labelled test image", "a test side", "Ingest more images.")
    return tests


def _describe_tests(pin: Pin, tests: Sequence[ImageRecord]) -> dict[str, Any]:
    """Return what a decision says of the test side it was made on."""
    return {
        "test_digest": compute_test_digest(tests),
        "num_test": len(tests),
        "num_keys": count_keys(code_keys([record.key for record in tests])),
        "dataset": {"name": pin.name, "version": pin.version, "digest": pin.digest},
    }


def _load_candidate(workspace: Workspace, pin: Pin) -> Predictor:
    """Load models/candidate, made for this name on the pinned dataset; while a training runs, say that instead."""
    candidate = load_candidate(workspace)
    try:
        _check_candidate(candidate.card, workspace.name, pin)
    except VisionLoopError as exc:
        require_no_training(workspace.settings, exc)
        raise
    return candidate


def _check_candidate(card: Card, name: str, pin: Pin) -> None:
    todo = "Run `visionloop train` again."
    if card.name != name:
        raise PromotionError("models/candidate", f"was trained as {card.name!r}", f"{name!r} (params.yaml name)", todo)
    if card.dataset.get("digest") != pin.digest:
        raise DatasetError(
            "models/candidate",
            f"was trained on dataset version {card.dataset.get('version')} ({str(card.dataset.get('digest'))[:12]})",
            f"version {pin.version} ({pin.digest[:12]}), as data/dataset.json says",
            todo,
        )


def _to_json(metrics: Metrics) -> dict[str, Any]:
    return {name: interval.to_json() for name, interval in metrics.items()}
