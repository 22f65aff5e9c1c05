"""An MLflow in memory, for tests that are not about MLflow. `tests/contract/test_tracking.py` holds the two equal."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from visionloop.errors import DiskError, TrackingError
from visionloop.tracking import DIGEST_TAG, RESTORED_TAG, Curve, Run, Tracking
from visionloop.tracking_pages import UsedDataset, describe_restored, load_card

FIRST_START = datetime(2026, 1, 1, tzinfo=UTC)


class MemoryTracking(Tracking):
    """Runs with params, tags, figures by step, artifacts by name; model versions. `down` makes every call fail."""

    def __init__(self, uri: str = "memory://") -> None:
        self.uri = uri
        self.down = False
        self.runs: dict[str, dict[str, Any]] = {}
        self.num_opened = 0  # of a run that a test deletes the id is not given again
        self.versions: dict[str, str] = {}
        self.version_tags: dict[str, dict[str, str]] = {}
        self.champion: str | None = None

    @property
    def only(self) -> dict[str, Any]:
        """The one run there is."""
        (run,) = self.runs.values()
        return run

    def open_run(self, run_name: str, *, run_id: str | None, tags: Mapping[str, str], params: Mapping[str, Any]) -> str:
        self._reach()
        if run_id not in self.runs:
            self.num_opened += 1
            run_id = f"{self.num_opened:032x}"
            self.runs[run_id] = {
                "name": run_name,
                "params": {key: str(value) for key, value in params.items()},
                "tags": dict(tags),
                "metrics": {},
                "artifacts": [],
            }
        self.runs[run_id]["status"] = "RUNNING"
        return run_id

    def find_tagged_run(self, tag: str, value: str) -> str | None:
        self._reach()
        return next((run_id for run_id, run in self.runs.items() if run["tags"].get(tag) == value), None)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        known = self._find(run_id)["params"]
        for key, value in params.items():
            if known.setdefault(key, str(value)) != str(value):
                raise TrackingError(f"MLflow {self.uri}", f"cannot be used ({key} changes)", "a reachable MLflow")

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        self._find(run_id)["metrics"].setdefault(step, {}).update(metrics)

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        run = self._find(run_id)
        if not path.exists():
            raise DiskError(str(path), "cannot be used (No such file or directory)", "a sound file and disk")
        names = [p.name for p in path.iterdir()] if path.is_dir() else [path.name]
        run["artifacts"] += [f"{folder}/{name}" for name in names]

    def log_images(self, run_id: str, paths: Iterable[Path]) -> None:
        self._find(run_id).setdefault("images", []).extend(path.stem for path in paths)

    def log_dataset(self, run_id: str, used: UsedDataset, context: str) -> None:
        self._find(run_id).setdefault("datasets", {})[used.title] = (used.short_digest, context)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._find(run_id)["tags"] |= tags

    def close_run(self, run_id: str, status: str = "FINISHED") -> None:
        self._find(run_id)["status"] = status

    def iterate_runs(self, status: str | None = None) -> Iterator[Run]:
        self._reach()
        wanted = [run_id for run_id, run in self.runs.items() if status in {None, run["status"]}]
        yield from map(self.load_run, reversed(wanted))

    def load_run(self, run_id: str) -> Run:
        run = self._find(run_id)
        metrics = {key: value for step in sorted(run["metrics"]) for key, value in run["metrics"][step].items()}
        started_at = FIRST_START + timedelta(seconds=list(self.runs).index(run_id))
        seconds = None if run["status"] == "RUNNING" else 1.0
        return Run(run_id, run["name"], run["status"], started_at, seconds, run["params"], metrics, run["tags"])

    def load_curves(self, run_id: str, keys: Iterable[str]) -> dict[str, Curve]:
        by_step = sorted(self._find(run_id)["metrics"].items())
        return {key: [(step, figures[key]) for step, figures in by_step if key in figures] for key in keys}

    def find_version(self, bundle_digest: str) -> str | None:
        self._reach()
        return self.versions.get(bundle_digest)

    def register_onnx(self, run_id: str | None, model_path: Path, bundle_digest: str, tags: Mapping[str, str]) -> str:
        if version := self.find_version(bundle_digest):
            return version
        assert model_path.is_file()
        if run_id not in self.runs and self.find_tagged_run(DIGEST_TAG, bundle_digest) is None:
            name, facts, params = describe_restored(load_card(model_path))
            self.close_run(self.open_run(name, run_id=None, tags={RESTORED_TAG: "true", **facts}, params=params))
        version = self.versions[bundle_digest] = str(len(self.versions) + 1)
        self.version_tags[version] = dict(tags)
        return version

    def set_champion(self, version: str) -> None:
        self._reach()
        if version not in self.version_tags:
            raise TrackingError(f"MLflow {self.uri}", f"cannot be used (no version {version})", "a reachable MLflow")
        self.champion = version

    def get_champion(self) -> str | None:
        self._reach()
        return self.champion

    def _reach(self) -> None:
        if self.down:
            raise TrackingError(f"MLflow {self.uri}", "cannot be used (connection refused)", "a reachable MLflow")

    def _find(self, run_id: str) -> dict[str, Any]:
        self._reach()
        if run_id not in self.runs:
            raise TrackingError(f"MLflow {self.uri}", f"cannot be used (no run {run_id})", "a reachable MLflow")
        return self.runs[run_id]
