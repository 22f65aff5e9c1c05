"""Runs, figures, registered models and aliases: one protocol, and MLflow behind it.

The only home of mlflow, which is imported when it is first used (3 s).
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from visionloop.errors import DiskError, SettingsError, TrackingError, VisionLoopError
from visionloop.secrets import mask
from visionloop.tracking_file import find_broken_file, open_database
from visionloop.tracking_pages import (
    UsedDataset,
    describe_for,
    describe_restored,
    load_card,
    log_model,
    make_dataset_input,
    make_source_tags,
    own_process,
)

CALL_ERRORS = (TrackingError, DiskError)  # what any call to MLflow may raise
CHAMPION_ALIAS = "champion"
DIGEST_TAG = "visionloop.bundle"
MAX_PARAM_CHARS = 500
PARENT_TAG = "mlflow.parentRunId"
KIND_TAG = "visionloop.kind"  # none: a training; else what else was run: tune, trial, lr-find
RETRAIN_TAG = "visionloop.retrain"  # of a run that holds those of a retrain: the digest of what it started from
PAGE = 200
SQLITE = "sqlite:///"
RESTORED_TAG = "visionloop.restored"
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One run as MLflow has it. `metrics` are the last values; `seconds` is None while it runs or if it was lost."""

    run_id: str
    name: str
    status: str
    started_at: datetime
    seconds: float | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def kind(self) -> str:
        """What was run: train, tune, trial or another word."""
        restored = "restored" if self.tags.get(RESTORED_TAG) else "train"
        return self.tags.get(KIND_TAG, restored)


class Tracking(Protocol):
    """The runs of one experiment, and the registered model of the same name.

    Every method raises TrackingError where the server cannot be reached, which may help itself, and DiskError where a
    file cannot be read or written, which does not.
    """

    uri: str

    def open_run(self, run_name: str, *, run_id: str | None, tags: Mapping[str, str], params: Mapping[str, Any]) -> str:
        """Open a new run, or go on with `run_id` if it still exists; return its id."""
        ...

    def find_tagged_run(self, tag: str, value: str) -> str | None:
        """Return the run of this experiment that bears a tag, or None."""
        ...

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log params of a run; those that are there must be equal."""
        ...

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log a set of metrics in one request."""
        ...

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a folder's content, into the run's artifacts."""
        ...

    def log_images(self, run_id: str, paths: Iterable[Path]) -> None:
        """Show pictures in the run, each under the name of its file; a newer one stands beside the older."""
        ...

    def log_dataset(self, run_id: str, used: UsedDataset, context: str) -> None:
        """Say which dataset version a run has used, and for what; said again it changes nothing."""
        ...

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        ...

    def close_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Mark a run FINISHED, FAILED or KILLED."""
        ...

    def iterate_runs(self, status: str | None = None) -> Iterator[Run]:
        """Yield the runs of the experiment, newest first; none if there is no experiment yet, and none is made."""
        ...

    def load_run(self, run_id: str) -> Run:
        """Return one run."""
        ...

    def load_curves(self, run_id: str, keys: Iterable[str]) -> dict[str, Curve]:
        """Return (step, value) of each metric in order; of a step that was logged twice, the last."""
        ...

    def find_version(self, bundle_digest: str) -> str | None:
        """Return the model version that mirrors a bundle, or None."""
        ...

    def register_onnx(self, run_id: str | None, model_path: Path, bundle_digest: str, tags: Mapping[str, str]) -> str:
        """Mirror a bundle's ONNX as a new version of the registered model; return the version.

        Its signature, description and test figures come from the bundle and the run. A version that already mirrors
        this bundle is returned as it is. Without a run, one is made and marked.
        """
        ...

    def set_champion(self, version: str) -> None:
        """Point the alias `champion` at a version."""
        ...

    def get_champion(self) -> str | None:
        """Return the version that the alias `champion` points at, or None."""
        ...


class MlflowTracking(Tracking):
    """One experiment of one MLflow server, or of an SQLite file."""

    def __init__(self, uri: str, artifact_root: str, name: str, user: str = "") -> None:
        """Describe the place, and who works there; nothing is opened until first use."""
        self.uri, self.artifact_root, self.name, self.user = uri, artifact_root, name, user
        self._client: Any = None
        self._experiment_id: str | None = None

    def open_run(self, run_name: str, *, run_id: str | None, tags: Mapping[str, str], params: Mapping[str, Any]) -> str:
        with self._translated():
            client, experiment_id = self._connect()
            if run_id and (found := self._find_run(run_id)):
                client.update_run(found, status="RUNNING")
                return found
            source = make_source_tags(tags.get(KIND_TAG, "train"), tags, self.user)
            run = client.create_run(experiment_id, run_name=run_name, tags={**source, **tags})
            self._log_params(str(run.info.run_id), params)
            return str(run.info.run_id)

    def find_tagged_run(self, tag: str, value: str) -> str | None:
        with self._translated():
            client, experiment_id = self._connect()
            runs = client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=1)
            return str(runs[0].info.run_id) if runs else None

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        with self._translated():
            self._log_params(run_id, params)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with self._translated():
            entities = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
            self._connect()[0].log_batch(run_id, metrics=entities)

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        with self._translated():
            client, _ = self._connect()
            if path.is_dir():
                client.log_artifacts(run_id, str(path), folder)
            else:
                client.log_artifact(run_id, str(path), folder)

    def log_images(self, run_id: str, paths: Iterable[Path]) -> None:
        from PIL import Image

        with self._translated():
            for path in paths:
                with Image.open(path) as image:
                    self._connect()[0].log_image(run_id, image.convert("RGB"), key=path.stem, step=0)

    def log_dataset(self, run_id: str, used: UsedDataset, context: str) -> None:
        with self._translated():
            self._connect()[0].log_inputs(run_id, [make_dataset_input(used, context)])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        with self._translated():
            for key, value in tags.items():
                self._connect()[0].set_tag(run_id, key, value)

    def close_run(self, run_id: str, status: str = "FINISHED") -> None:
        with self._translated():
            self._connect()[0].set_terminated(run_id, status)

    def iterate_runs(self, status: str | None = None) -> Iterator[Run]:
        query = f"attributes.status = '{status}'" if status else ""
        token = None
        while True:
            with self._translated():
                experiment_id = self._find_experiment()
                if experiment_id is None:
                    return
                page = self._open().search_runs(
                    [experiment_id],
                    query,
                    max_results=PAGE,
                    order_by=["attributes.start_time DESC"],
                    page_token=token,
                )
            yield from map(_make_run, page)
            if not (token := page.token):
                return

    def load_run(self, run_id: str) -> Run:
        with self._translated():
            return _make_run(self._connect()[0].get_run(run_id))

    def load_curves(self, run_id: str, keys: Iterable[str]) -> dict[str, Curve]:
        with self._translated():
            client, _ = self._connect()
            histories = {key: client.get_metric_history(run_id, key) for key in keys}
        newest_last = {key: sorted(points, key=lambda m: m.timestamp) for key, points in histories.items()}
        return {key: sorted({m.step: m.value for m in points}.items()) for key, points in newest_last.items()}

    def find_version(self, bundle_digest: str) -> str | None:
        with self._translated():
            client, _ = self._connect()
            for version in client.search_model_versions(f"name='{self.name}'"):
                if version.tags.get(DIGEST_TAG) == bundle_digest:
                    return str(version.version)
        return None

    def register_onnx(self, run_id: str | None, model_path: Path, bundle_digest: str, tags: Mapping[str, str]) -> str:
        import mlflow
        import onnx

        if version := self.find_version(bundle_digest):
            return version
        with self._translated(), own_process(model_path.parent.parent):
            client, experiment_id = self._connect()
            found = self._find_run(run_id) if run_id else None
            run_id = found or self.find_tagged_run(DIGEST_TAG, bundle_digest)  # trained in a queue, or in another clone
            run_id = run_id or self._make_restored(model_path)
            mlflow.set_tracking_uri(self.uri)
            mlflow.set_experiment(experiment_id=experiment_id)  # else the model lands in ./mlruns of experiment 0
            info = log_model(run_id, onnx.load(str(model_path)))
            self._ensure_model()
            words = describe_for(client, run_id, info.model_id, load_card(model_path), bundle_digest)
            tags = {**words.tags, **tags, DIGEST_TAG: bundle_digest}
            facts = {"run_id": run_id, "model_id": info.model_id, "tags": tags, "description": words.text}
            version = client.create_model_version(self.name, info.model_uri, **facts)  # a server wants the id, too
            return str(version.version)

    def _make_restored(self, model_path: Path) -> str:
        """Make the run of a bundle whose training is not known here, and mark it."""
        name, tags, params = describe_restored(load_card(model_path))
        run_id = self.open_run(name, run_id=None, tags={RESTORED_TAG: "true", **tags}, params=params)
        self.close_run(run_id)
        return run_id

    def set_champion(self, version: str) -> None:
        with self._translated():
            self._connect()[0].set_registered_model_alias(self.name, CHAMPION_ALIAS, version)

    def get_champion(self) -> str | None:
        from mlflow.exceptions import MlflowException

        with self._translated():
            client, _ = self._connect()
            try:
                return str(client.get_model_version_by_alias(self.name, CHAMPION_ALIAS).version)
            except MlflowException as exc:
                if exc.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                    return None
                raise

    def _connect(self) -> tuple[Any, str]:
        """Return the client and the id of the experiment, which is made if there is none."""
        if (experiment_id := self._find_experiment()) is None:
            root = f"{self.artifact_root}/{self.name}" if self._database else None
            experiment_id = self._experiment_id = str(self._open().create_experiment(self.name, artifact_location=root))
        return self._open(), experiment_id

    def _find_experiment(self) -> str | None:
        """Return the experiment's id, or None; a database that is not there is not made. Raises SettingsError."""
        if self._experiment_id is None and (self._database is None or self._database.is_file()):
            experiment = self._open().get_experiment_by_name(self.name)
            if experiment and experiment.lifecycle_stage == "deleted":
                number = experiment.experiment_id
                raise SettingsError(
                    f"MLflow {mask(self.uri)}",
                    f"the experiment {self.name} is deleted there",
                    "one that is not",
                    f"`mlflow experiments restore --experiment-id {number}` brings it back; `mlflow gc "
                    f"--experiment-ids {number}` removes it for good, and a new one is made.",
                )
            self._experiment_id = str(experiment.experiment_id) if experiment else None
        return self._experiment_id

    def _open(self) -> Any:
        from mlflow import MlflowClient

        if self._client is None:
            if self._database:
                open_database(self._database, self.artifact_root)
            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        return self._client

    @property
    def _database(self) -> Path | None:
        return Path(self.uri.removeprefix(SQLITE)) if self.uri.startswith(SQLITE) else None

    def _find_run(self, run_id: str) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            run = self._connect()[0].get_run(run_id)
        except MlflowException as exc:
            if exc.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else None

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in sorted(params.items())]
        self._connect()[0].log_batch(run_id, params=entities)

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._connect()[0].create_registered_model(self.name)
        except MlflowException as exc:
            if exc.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the errors of MLflow, of the network and of the disk into ours, once."""
        import sqlite3

        from mlflow.exceptions import MlflowException  # the first: where it is missing, its extra is named
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except VisionLoopError:
            raise
        except (MlflowException, RequestException, SQLAlchemyError, sqlite3.Error, OSError) as exc:
            where = f"MLflow {mask(self.uri)}"
            if broken := find_broken_file(exc, str(self._database or where)):
                path, reason = broken
                todo = "Free some, or make it readable and writable."
                raise DiskError(path, f"cannot be used for {where} ({reason})", "a sound file and disk", todo) from exc
            reason = " ".join(str(exc).replace(self.uri, mask(self.uri)).split())[:200]
            status = getattr(exc, "get_http_status_code", lambda: None)()
            if status == 401:
                todo = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
                found, expected = "does not let us in (401)", "a user and a password that it knows"
                raise TrackingError(where, found, expected, todo) from exc
            raise TrackingError(
                where,
                f"cannot be used ({reason})",
                "a reachable MLflow",
                "Start the server, or set MLFLOW_TRACKING_URI; unset it for SQLite in the workspace.",
            ) from exc


def copy_figures(tracking: Tracking, source: str, target: str, names: Iterable[str]) -> None:
    """Log in a run what another one has of these figures, step by step. Raises TrackingError."""
    by_step: dict[int, dict[str, float]] = {}
    for name, curve in tracking.load_curves(source, names).items():
        for step, value in curve:
            by_step.setdefault(step, {})[name] = value
    for step, figures in by_step.items():
        tracking.log_metrics(target, figures, step=step)


def _make_run(run: Any) -> Run:
    info, data = run.info, run.data
    seconds = (info.end_time - info.start_time) / 1000 if info.end_time else None
    started_at = datetime.fromtimestamp(info.start_time / 1000, UTC)
    name = info.run_name or ""
    return Run(info.run_id, name, info.status, started_at, seconds, data.params, data.metrics, data.tags)
