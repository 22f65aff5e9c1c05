"""The stage `gate`: candidate against champion on the same test side. Stores its decision, changes no champion.

The rules are in `gate.py`, the answers of both models in `score.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from visionloop.bundle import download_bundle, load_run_note
from visionloop.data.known_store import check_store
from visionloop.data.manifest import load_pin, load_records
from visionloop.errors import DatasetError, PromotionError
from visionloop.evaluation.answers import Answers, compute_answer_metrics
from visionloop.params import Params
from visionloop.predictor import Choices, Predictor
from visionloop.promotion.gate import (
    check_difference,
    check_floors,
    compute_difference,
    compute_verdict,
    make_first_rule,
    make_same_rule,
    make_task_rule,
)
from visionloop.promotion.ledger import read_champion, store_decision, write_decision
from visionloop.promotion.score import Scores, compute_test_digest, map_scores, score_bundle, select_test, to_sets
from visionloop.records import Card, Decision, ImageRecord, Interval, Pin, RuleResult
from visionloop.store import ObjectStore
from visionloop.workspace import Workspace

Metrics = dict[str, Interval]


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
        BundleError: a bundle is damaged, or answers differently here.
        StoreError: the store cannot be read, or is not the one that the workspace knows.
        TrackingError: MLflow cannot be tagged; the decision is stored by then.
    """
    settings, store, name = workspace.settings, workspace.store, workspace.name
    check_store(workspace)
    pin = load_pin(settings.pin_path, workspace.name)
    candidate = Predictor.load(settings.candidate_dir)
    _check_candidate(candidate.card, name, pin)
    tests = _load_tests(store, pin, with_negatives=workspace.params.prepare.unlabelled == "negative")
    champion = read_champion(store, name)
    models = [candidate]
    if champion and champion.bundle != candidate.digest:
        rival = Predictor(download_bundle(store, champion.bundle, settings.hidden_dir / "bundles"))
        rival.check_golden()
        models.append(rival)
    scores = [score_bundle(store, model, tests, on_progress=on_progress) for model in models]
    rules, metrics = _judge(workspace.params, tests, scores, is_champion=bool(champion) and len(scores) == 1)
    tasks = [model.card.task for model in models]
    if len(set(tasks)) > 1 and "multilabel" in tasks:
        rules.insert(0, make_task_rule(*tasks))
    note = load_run_note(settings.runs_dir, candidate.digest)
    decision = Decision(
        name=name,
        number=0,
        verdict=compute_verdict(rules),
        candidate=candidate.digest,
        champion=champion.bundle if champion else None,
        test_digest=compute_test_digest(tests),
        num_test=len(tests),
        rules=tuple(rules),
        metrics=_to_json(metrics[0]),
        champion_metrics=_to_json(metrics[-1]) if champion else {},
        state=dict(state),
        dataset={"name": pin.name, "version": pin.version, "digest": pin.digest},
        run_id=note.run_id if note else None,
        decided_at=now,
    )
    decision = store_decision(store, decision)
    write_decision(settings.decisions_dir, decision)
    if decision.run_id:
        tags = {"visionloop.verdict": decision.verdict, "visionloop.decision": str(decision.number)}
        workspace.tracking.set_tags(decision.run_id, tags)
    return decision


def _load_tests(store: ObjectStore, pin: Pin, *, with_negatives: bool) -> list[ImageRecord]:
    tests = select_test(load_records(store, pin), with_negatives=with_negatives)
    if not tests:
        where = f"dataset {pin.name} version {pin.version}"
        raise DatasetError(where, "has no labelled test image", "a test side", "Ingest more images.")
    return tests


def _judge(
    params: Params, tests: Sequence[ImageRecord], scores: Sequence[Scores], *, is_champion: bool
) -> tuple[list[RuleResult], list[Metrics]]:
    """Return the result of each rule, and the figures of the candidate, then of the champion if it was scored."""
    # The candidate's classes come first. An answer with a class that only the champion knows is wrong, but no error.
    names = [name for record in tests for name in record.labels]
    classes = list(dict.fromkeys([c for s in scores for c in s.classes] + names))
    aligned = [map_scores(s, classes) for s in scores]
    labels: Choices
    if any(s.chosen.ndim == 2 for s in scores) or any(len(r.labels) != 1 for r in tests):
        aligned = [to_sets(s) for s in aligned]
        labels = np.array([[name in r.labels for name in classes] for r in tests])
    else:
        labels = np.array([classes.index(name) for name in names])
    metrics = [
        compute_answer_metrics(Answers(labels, s.probs_nk, s.chosen, s.classes), params.evaluate) for s in aligned
    ]
    rules = check_floors({str(k): v for k, v in params.gate.floors.items()}, metrics[0])
    if is_champion:
        rules.append(make_same_rule(params.gate))
    elif len(aligned) == 1:
        rules.append(make_first_rule())
    else:
        difference = compute_difference(
            labels,
            aligned[0].chosen,
            aligned[1].chosen,
            len(classes),
            params.gate,
            resamples=params.evaluate.resamples,
            seed=params.evaluate.seed,
        )
        rules.append(check_difference(difference, params.gate))
    return rules, metrics


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
