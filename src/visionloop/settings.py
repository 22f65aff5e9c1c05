"""Where it runs: workspace, store, MLflow, tool homes. Read from the environment once, by the entry points.

What changes results is in params.yaml instead (`params/`).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from visionloop.errors import SettingsError

PARAMS_FILE = "params.yaml"
PARENT_VARIABLE = "VISIONLOOP_PARENT_RUN"  # a retrain tells its stages
TOOLS_VARIABLE = "VISIONLOOP_TOOLS"  # the workspace in which the variables of `tool_environment` keep the tools

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CHECKPOINTS = ("auto", "store", "local")
MAX_LOADERS = 256

# Opt-outs of telemetry, and limits that keep a dead server from hanging a command for minutes.
QUIET_TOOLS = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "ORT_DISABLE_TELEMETRY": "1",
    "PREFECT_TASKS_DEFAULT_NO_CACHE": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Settings:
    """The places of one workspace. All paths are absolute."""

    home: Path
    store_url: str
    tracking_uri: str
    artifact_root: str
    checkpoints: str = "auto"  # of a training in the store too: store, local, or auto (where the store is remote)
    parent_run: str | None = None  # the MLflow run of the retrain that a stage works for
    loader_workers: int | None = None  # processes that read training batches, for each rank; 0: a thread, None: chosen
    keys_file: Path | None = None  # of the server; None: keys.json in the hidden folder

    @property
    def params_path(self) -> Path:
        return self.home / PARAMS_FILE

    @property
    def keys_path(self) -> Path:
        return self.keys_file or self.hidden_dir / "keys.json"

    @property
    def pin_path(self) -> Path:
        return self.home / "data" / "dataset.json"

    @property
    def prepared_dir(self) -> Path:
        return self.home / "data" / "prepared"

    @property
    def features_dir(self) -> Path:
        return self.home / "features"

    @property
    def candidate_dir(self) -> Path:
        return self.home / "models" / "candidate"

    @property
    def reports_dir(self) -> Path:
        return self.home / "reports"

    @property
    def decisions_dir(self) -> Path:
        return self.home / "decisions"

    @property
    def hidden_dir(self) -> Path:
        """Everything that is neither input nor result: work in progress, caches, logs."""
        return self.home / ".visionloop"

    @property
    def runs_dir(self) -> Path:
        return self.hidden_dir / "runs"

    def work_dir(self, stage: str) -> Path:
        return self.hidden_dir / "work" / stage


def find_home(env: Mapping[str, str], start: Path | None = None) -> Path:
    """Return the workspace: the nearest folder with a params.yaml at or above `start`, if somebody has named that.

    Without `start` it is VISIONLOOP_HOME, or the nearest such folder at or above the current one.

    Raises:
        SettingsError: there is none.
    """
    named = env.get("VISIONLOOP_HOME")
    if start is None and named:
        home = Path(named).expanduser().resolve()
        if not (home / PARAMS_FILE).is_file():
            raise SettingsError(
                f"workspace {home}",
                f"has no {PARAMS_FILE}",
                "a workspace",
                f"Make one with `visionloop new {named}`.",
            )
        return home
    start = start or Path.cwd()
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / PARAMS_FILE).is_file():
            return folder
    raise SettingsError(
        f"workspace {start}",
        f"no {PARAMS_FILE} here or above",
        "a workspace",
        "Make one with `visionloop start PHOTOS` or `visionloop new DIR`, or set VISIONLOOP_HOME.",
    )


def load_settings(env: Mapping[str, str], start: Path | None = None) -> Settings:
    """Build the settings of the workspace that `find_home` returns. Relative places in `env` are relative to it."""
    home = find_home(env, start)
    base = find_base(home)
    hidden = base / ".visionloop"
    store_url = env.get("VISIONLOOP_STORE") or (hidden / "store").as_uri()
    if re.match(r"^[A-Za-z0-9]{2,}:", store_url) and "://" not in store_url:  # s3:/bucket is no folder `s3:`
        expected = "file:///folder, a path, or s3://bucket/prefix"
        raise SettingsError("VISIONLOOP_STORE", f"got {store_url!r}", expected, "Write two slashes after the colon.")
    if not re.match(r"^[a-z0-9]+://", store_url):
        store_url = (base / Path(store_url).expanduser()).resolve().as_uri()
    return Settings(
        home=home,
        store_url=store_url,
        tracking_uri=_place_database(base, env.get("MLFLOW_TRACKING_URI") or "sqlite:///.visionloop/mlflow/mlflow.db"),
        artifact_root=(hidden / "mlflow" / "artifacts").as_uri(),
        checkpoints=_read_choice("VISIONLOOP_CHECKPOINTS", env.get("VISIONLOOP_CHECKPOINTS"), CHECKPOINTS),
        parent_run=env.get(PARENT_VARIABLE) or None,
        loader_workers=_read_count("VISIONLOOP_LOADER_WORKERS", env.get("VISIONLOOP_LOADER_WORKERS"), MAX_LOADERS),
        keys_file=(base / Path(keys).expanduser()) if (keys := env.get("VISIONLOOP_KEYS")) else None,
    )


def find_base(home: Path) -> Path:
    """Return the workspace whose store and MLflow are used: for a copy that dvc made for a queued experiment, its own.

    `dvc exp run --queue` trains in WORKSPACE/.dvc/tmp/exps/NAME, where no store is.
    """
    before, queue, _ = f"{home}/".partition("/.dvc/tmp/exps/")
    return Path(before) if queue and (Path(before) / PARAMS_FILE).is_file() else home


def _place_database(home: Path, uri: str) -> str:
    """Return the URI of MLflow; a relative path of an SQLite file (three slashes) is made absolute."""
    scheme, _, path = uri.partition(":///")
    return f"{scheme}:///{home / path}" if scheme == "sqlite" and path else uri


def _read_choice(name: str, value: str | None, choices: tuple[str, ...]) -> str:
    """Return a variable's value, the first choice if it is not set. Raises SettingsError."""
    if value and value not in choices:
        raise SettingsError(name, f"got {value!r}", f"one of {', '.join(choices)}", "Correct it, or unset it.")
    return value or choices[0]


def _read_count(name: str, value: str | None, most: int) -> int | None:
    """Return a variable's value, None if it is not set. Raises SettingsError."""
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) > most:
        raise SettingsError(name, f"got {value!r}", f"a whole number from 0 to {most}", "Correct it, or unset it.")
    return int(value)


def tool_environment(home: Path) -> dict[str, str]:
    """Return the variables that keep other tools quiet and inside the workspace.

    Entry points set those that are not set already, before they import the tools.
    """
    hidden = home / ".visionloop"
    return {
        **QUIET_TOOLS,
        "PREFECT_HOME": str(hidden / "prefect"),
        "DVC_SITE_CACHE_DIR": str(hidden / "dvc" / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(hidden / "dvc" / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(hidden / "dvc" / "system"),
        "MPLCONFIGDIR": str(hidden / "matplotlib"),
        "TORCH_HOME": str(hidden / "torch"),
        "TORCHINDUCTOR_CACHE_DIR": str(hidden / "torch" / "inductor"),
        "XDG_CACHE_HOME": str(hidden / "cache"),
        "TMPDIR": str(hidden / "tmp"),  # a killed training leaves half a checkpoint there
        TOOLS_VARIABLE: str(home),
    }


def choose_tool_environment(env: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the tool environment of a workspace: what the user has set stays, what another workspace has set goes."""
    before = tool_environment(Path(env[TOOLS_VARIABLE])) if TOOLS_VARIABLE in env else {}
    ours = tool_environment(home)
    chosen = {name: value if env.get(name) in {None, before.get(name)} else env[name] for name, value in ours.items()}
    return {**chosen, **_spare_loopback(env)}


def _spare_loopback(env: Mapping[str, str]) -> dict[str, str]:
    """Return NO_PROXY with this machine in it, where a proxy is set: our own servers are not asked through it."""
    if not any(name.lower() in PROXIES for name in env):
        return {}
    hosts = [host.strip() for host in (env.get("no_proxy") or env.get("NO_PROXY") or "").split(",") if host.strip()]
    if "*" in hosts:
        return {}
    spared = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
    return {"NO_PROXY": spared, "no_proxy": spared}


def apply_tool_environment(home: Path) -> None:
    """Set the tool environment in this process where the user has not. For entry points only."""
    os.environ.update(choose_tool_environment(os.environ, home))
    make_tool_folders(home)


def make_tool_folders(home: Path) -> None:
    """Make the folders that must be there first: dvc would make its own, and ours above it, writable for all."""
    for folder in ("dvc/site", "matplotlib", "tmp"):
        (home / ".visionloop" / folder).mkdir(parents=True, exist_ok=True)
