"""A study of `visionloop tune`: the database of its trials, what is suggested next, what came of each.

.visionloop/tune/NAME-DIGEST.db   every trial, its values and result; the digest is over all that it depends on

What is suggested is a function of the seed and of the trials that are finished, so a study that was stopped goes on as
if it had not been. Only here and in `tune.py` is optuna imported.
"""

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from visionloop.errors import ParamsError, TrainingError
from visionloop.evaluation.plots import BLUE, DPI, MUTED, RED, STYLE, open_figure
from visionloop.params import Params, Span, Train
from visionloop.params.train import STEPS, WAYS_ON_EMBEDDINGS, nest
from visionloop.records import compute_digest
from visionloop.training.checks import check_training, list_figures
from visionloop.training.fit import make_job
from visionloop.training.job import Call, Job
from visionloop.training.watch import TrialReport, Watcher
from visionloop.workspace import Workspace

NUM_STARTUP = 10  # trials at random before TPE has something to go by, as in its paper's reference code
NUM_FOR_IMPORTANCE = 8
DIGITS = 4  # of a suggested number: it is tried as it would stand in params.yaml
FACTS = "facts"  # of a trial that was not killed: how it ended, with which values, in what time
STATES = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
Values = dict[str, Any]


@dataclass(frozen=True)
class Tuning:
    """All that a study depends on, opened: `base` is the job that every trial varies.

    `needed`: keys of train beside the space that its values are of use with.
    """

    base: Job
    study: optuna.Study
    database: Path
    needed: Mapping[str, str]

    @property
    def params(self) -> Params:
        return self.base.params


def open_tuning(workspace: Workspace, *, watcher: Watcher) -> Tuning:
    """Open the study of these params and this prepared data, and check what can be checked before a trial.

    Raises:
        ParamsError: the space or the metric does not fit the way or the data.
        DatasetError: there is no prepared data to learn from.
    """
    params = make_base(workspace.params)
    needed = {"solver": params.train.solver} if params.train.solver != workspace.params.train.solver else {}
    if needed:
        watcher.tell("heads on embeddings learn by epochs (train.solver: epochs), as tune.space has keys of steps")
    # One machine, one process, checkpoints here: a trial is short.
    settings = replace(workspace.settings, checkpoints="local")
    needed = {"solver": params.train.solver} if params.train.solver != workspace.params.train.solver else {}
    if needed:
        watcher.tell("trials of the way frozen learn by epochs (train.solver: epochs), as tune.space asks for")
    base = replace(workspace, settings=settings, params=params)
    data = check_training(base)
    job = make_job(base, data, Call(code_digest="tune", watcher=watcher))
    prepared = job.prepared
    section, train = params.tune, params.train
    names = [name for name in list_figures(prepared.task, train.on) if name.startswith("val/")]
    if section.metric not in names:
        found = f"got {section.metric!r}, which no epoch has"
        raise ParamsError("params.yaml tune.metric", found, f"one of {', '.join(names)}", "Edit the file.")
    report = json.loads((prepared.folder / "report.json").read_text())
    varied = dict.fromkeys(section.space)
    fixed = override(train.model_dump(mode="json"), varied)
    depends_on = [section.model_dump(mode="json", exclude={"trials"}), fixed, report, params.task]
    folder = settings.hidden_dir / "tune"
    folder.mkdir(parents=True, exist_ok=True)
    database = folder / f"{params.name}-{compute_digest(depends_on)[:12]}.db"
    return Tuning(job, _open_study(database, params), database, needed)


def make_base(params: Params) -> Params:
    """Return the params that trials vary: one process, the epochs of a trial, watching the metric of the study.

    A space with keys that only steps go by (`learning_rate`) makes trials of the way `frozen` learn by epochs.

    Raises:
        ParamsError: there is no validation side, embeddings of one network cannot serve others, or a key of the space
            changes nothing.
    """
    section, train = params.tune, params.train
    if train.on == "all":
        raise ParamsError(
            "params.yaml train.on", "got 'all'", "`train` to tune: trials are judged on the validation side", "Edit it."
        )
    choices = section.space.get("way", (train.way,))
    ways = frozenset(choices if isinstance(choices, tuple) else ())
    encoder = {"backbone", "weights"} & section.space.keys()
    if encoder and WAYS_ON_EMBEDDINGS & ways:
        key = min(encoder)
        raise ParamsError(
            f"params.yaml tune.space.{key}",
            f"varies with the way {train.way}",
            "one network: its embeddings are made once, by the stage embed",
            "Take it out of the space, or set train.way.",
        )
    changed: dict[str, Any] = {"max_epochs": section.max_epochs or train.max_epochs}
    by_steps = sorted(section.space.keys() & set(STEPS))
    if by_steps and "frozen" in ways and "solver" not in section.space:
        if train.solver == "lbfgs":
            raise ParamsError(
                f"params.yaml tune.space.{by_steps[0]}",
                "changes nothing with train.solver: lbfgs",
                "keys that such a head goes by: C, imbalance, label_smoothing",
                "Take it out of the space, or set train.solver to epochs.",
            )
        changed["solver"] = "epochs"
    alone = {"strategy": "auto", "devices": 1, "num_nodes": 1, "tensorboard": False, "confusion_every": 0}
    compute = params.compute.model_copy(update=alone)
    train = make_train(train, changed)
    return params.model_copy(update={"train": train, "compute": compute})


def make_train(train: Train, values: Mapping[str, Any]) -> Train:
    """Return the section with other values. Raises ParamsError if they do not fit each other."""
    try:
        return Train.model_validate(override(train.model_dump(), values))
    except ValidationError as exc:
        message = exc.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        raise ParamsError("trial", shown, message, "Narrow tune.space.") from exc


def override(section: Mapping[str, Any], values: Mapping[str, Any]) -> Values:
    """Return a dumped section with other values of dotted keys."""
    changed = dict(section)
    for key, value in nest(values).items():
        changed[key] = {**changed[key], **value} if isinstance(value, dict) else value
    return changed


def _open_study(database: Path, params: Params) -> optuna.Study:
    """Open the database; a damaged one is an error that names it."""
    from sqlalchemy.exc import DatabaseError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    falls = params.tune.metric.endswith("loss")
    try:
        return optuna.create_study(
            study_name=params.name,
            storage=f"sqlite:///{database}",
            pruner=_make_pruner(params),
            direction="minimize" if falls else "maximize",
            load_if_exists=True,
        )
    except (DatabaseError, optuna.exceptions.StorageInternalError, RuntimeError) as exc:
        reason = " ".join(str(exc).split())[:120]
        raise TrainingError(
            f"study {database}", f"cannot be read ({reason})", "a study of optuna", "Delete it, or restore it."
        ) from exc


def _make_pruner(params: Params) -> optuna.pruners.BasePruner:
    section = params.tune
    if section.prune == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if section.prune == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=params.train.max_epochs)
    return optuna.pruners.NopPruner()


def list_finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that were not killed: done, pruned or failed."""
    trials = study.get_trials(deepcopy=False, states=tuple(STATES))
    return [trial for trial in trials if FACTS in trial.user_attrs]


def make_sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of one trial: its randomness is a function of the seed and of how many were finished."""
    return optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=NUM_STARTUP)


def suggest(trial: optuna.Trial, space: Mapping[str, Any]) -> Values:
    """Ask for a value of each key of the space; numbers are rounded to four digits."""
    values = {}
    for key, choices in sorted(space.items()):
        if not isinstance(choices, Span):
            values[key] = trial.suggest_categorical(key, list(choices))
        elif isinstance(choices.low, int) and isinstance(choices.high, int):
            values[key] = trial.suggest_int(key, choices.low, choices.high, log=choices.log)
        else:
            value = trial.suggest_float(key, choices.low, choices.high, log=choices.log)
            values[key] = min(max(float(f"{value:.{DIGITS}g}"), choices.low), choices.high)
    return values


def list_reports(tuning: Tuning) -> list[TrialReport]:
    """Return the finished trials in order, numbered from 1."""
    metric, best, reports = tuning.params.tune.metric, None, []
    for number, trial in enumerate(list_finished(tuning.study), start=1):
        facts, done = trial.user_attrs[FACTS], trial.state is TrialState.COMPLETE
        value = trial.value if done else facts["best_seen"]
        better = done and (best is None or is_better(tuning, trial.value, best))
        best = trial.value if better else best
        reports.append(
            TrialReport(
                number=number,
                state=STATES[trial.state],
                metric=metric,
                value=value,
                best=best,
                is_best=better,
                values=facts["values"],
                epochs=facts["epochs"],
                seconds=facts["seconds"],
                reason=facts["reason"],
            )
        )
    return reports


def is_better(tuning: Tuning, value: float | None, than: float) -> bool:
    """Say whether a value of the metric is better than another."""
    falls = tuning.study.direction is optuna.study.StudyDirection.MINIMIZE
    return value is not None and (value < than if falls else value > than)


def compute_importance(tuning: Tuning) -> dict[str, float]:
    """Return how much of the spread of the results each key explains, the largest first (fANOVA, Hutter et al. 2014).

    Empty while there are too few trials to say, or if all have the same result.
    """
    done = tuning.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < NUM_FOR_IMPORTANCE or len({trial.value for trial in done}) == 1:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(tuning.study, evaluator=evaluator)
    return {key: float(share) for key, share in shares.items()}


def draw_parallel(tuning: Tuning) -> bytes:
    """Draw each trial that went to its end as a line through its values to its result: the better the darker."""
    import matplotlib
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    sink = io.BytesIO()
    style: Any = {**STYLE, "text.parse_math": True}  # 10^-3 is a formula
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental" since 2.2
        axes = plot_parallel_coordinate(tuning.study, target_name=tuning.params.tune.metric)
        axes.set_title(f"{len(list_finished(tuning.study))} trials")
        figure: Any = axes.figure
        figure.set_size_inches(3 + 2 * len(tuning.params.tune.space), 4.6)
        figure.savefig(sink, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
        pyplot.close(figure)
    return sink.getvalue()


def draw_history(reports: Sequence[TrialReport], metric: str) -> bytes:
    """Draw the result of every trial and the best so far; pruned ones hollow, where they were left."""
    from matplotlib.ticker import MaxNLocator

    with open_figure(7.6, 3.8) as (figure, sink):
        axes = figure.add_subplot()
        for state, style in (("done", {"facecolor": BLUE}), ("pruned", {"facecolor": "white", "edgecolor": MUTED})):
            shown = [(r.number, r.value) for r in reports if r.state == state and r.value is not None]
            if shown:
                axes.scatter(*zip(*shown, strict=True), s=22, label=state, zorder=3, **style)
        if failed := [r.number for r in reports if r.state == "failed"]:
            axes.plot(
                failed, [0.02] * len(failed), "x", color=RED, transform=axes.get_xaxis_transform(), label="failed"
            )
        if best := [(r.number, r.best) for r in reports if r.best is not None]:
            axes.step(*zip(*best, strict=True), where="post", color=RED, linewidth=1.5, label="best so far")
        axes.set(xlabel="trial", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid()
        axes.legend(frameon=False)
        axes.set_title(f"{len(reports)} trials")
    return sink.getvalue()
