"""Two models on the same test images, side by side. Stores no decision and promotes nothing."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from visionloop.data.manifest import iterate_records, load_pin
from visionloop.errors import DatasetError, PromotionError
from visionloop.evaluation.resampling import code_keys, count_keys
from visionloop.predictor import Predictor
from visionloop.promotion.evidence import Asked, collect_facts
from visionloop.promotion.gate import compute_verdict
from visionloop.promotion.judge import Case, align, judge
from visionloop.promotion.report import RetrainFacts
from visionloop.promotion.score import compute_test_digest, score_bundle, select_test
from visionloop.records import Decision
from visionloop.tracking import DIGEST_TAG
from visionloop.workspace import Workspace


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
    tests = select_test(
        iterate_records(workspace.store, pin), with_negatives=workspace.params.prepare.unlabelled == "negative"
    )
    if not tests:
        where = f"dataset {pin.name} version {pin.version}"
        raise DatasetError(where, "has no labelled test image", "a test side", "Ingest more images.")
    score = partial(score_bundle, workspace.store, tests=tests, on_progress=on_progress)
    case = Case(params=workspace.params, tests=tests, candidate=score(one), champion=score(other))
    rules, metrics = judge(case)
    figures = [{name: interval.to_json() for name, interval in each.items()} for each in metrics]
    decision = Decision(
        name=workspace.name,
        number=0,
        verdict=compute_verdict(rules),
        candidate=one.digest,
        champion=other.digest,
        test_digest=compute_test_digest(tests),
        num_test=len(tests),
        rules=tuple(rules),
        metrics=figures[0],
        champion_metrics=figures[1],
        state={},
        dataset={"name": pin.name, "version": pin.version, "digest": pin.digest},
        run_id=None,
        decided_at=now,
        num_keys=count_keys(code_keys([record.key for record in tests])),
    )
    cards = [(model.digest, model.card) for model in models]
    return replace(collect_facts(workspace, decision, Asked(tests, align(case), cards), None), names=names)


def find_bundle_of_run(workspace: Workspace, run_id: str) -> Path | str:
    """Return where the bundle of an MLflow run is: a folder of this workspace, or its digest if the store has it.

    Raises:
        TrackingError: MLflow has no such run. PromotionError: its bundle is nowhere to be found.
    """
    settings = workspace.settings
    known = next((run for run in workspace.tracking.iterate_runs() if run.run_id == run_id), None)
    if known is None:
        raise PromotionError(f"run {run_id}", "is not in MLflow", "a run of this name", "See `visionloop runs`.")
    digest = known.tags.get(DIGEST_TAG, "")
    for folder in (settings.hidden_dir / "bundles" / digest, settings.candidate_dir):
        if digest and (folder / "digests.json").is_file() and Predictor.load(folder).digest == digest:
            return folder
    if digest and workspace.store.exists(f"bundles/{digest}/digests.json"):
        return digest
    raise PromotionError(
        f"run {run_id}",
        f"its bundle {digest[:12]} is in neither the workspace nor the store" if digest else "has no bundle",
        "a run whose model is kept",
        "Models that were registered are in the store; others stay until the next training: see `dvc exp apply`.",
    )
