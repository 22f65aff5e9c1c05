"""The workspace: a folder with params.yaml, opened once and passed on; and `visionloop new`, which makes one."""

import contextlib
import getpass
import os
import re
import shutil
import subprocess
import unicodedata
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from visionloop.errors import SettingsError
from visionloop.settings import Settings, apply_tool_environment, load_settings, make_tool_folders

if TYPE_CHECKING:
    from visionloop.params import Params
    from visionloop.store import ObjectStore
    from visionloop.tracking import Tracking


COMMON = {"dvc.yaml": "dvc.yaml", "gitignore": ".gitignore", "env.example": ".env.example"}


DEFAULT_EXAMPLE = "photos"  # where nothing else is asked for


def list_examples() -> list[str]:
    """Return the names of the examples, sorted."""
    return sorted(p.name for p in resources.files("visionloop.examples").iterdir() if (p / "params.yaml").is_file())


def make_workspace(folder: Path, example: str | None = None, *, name: str | None = None) -> Path:
    """Make a workspace: params.yaml, dvc.yaml, .gitignore, .env.example, code.json; git and dvc set up. Return it.

    Without an example it is for photos of one's own, and its name is made from that of the folder.

    Raises:
        SettingsError: there is no such example, or the folder is not empty.
        ParamsError: the name is not usable.
    """
    folder = folder.expanduser().resolve()
    if example is None:
        example, name = DEFAULT_EXAMPLE, name or make_name(folder.name)
    elif example not in list_examples():
        raise SettingsError("visionloop new --example", f"got {example!r}", f"one of {', '.join(list_examples())}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"workspace {folder}", "is not empty", "a new or empty folder", "Choose another one.")
    existed = folder.exists()
    try:
        _fill(folder, example, name)
    except BaseException as exc:
        clear_folder(folder, keep=existed)
        if isinstance(exc, OSError):
            todo = "Choose another place, or make it writable."
            raise SettingsError(f"workspace {folder}", f"cannot be made ({exc.strerror})", "a folder", todo) from exc
        raise
    return folder


def clear_folder(folder: Path, *, keep: bool = False) -> None:
    """Remove a workspace that was made for nothing; with `keep` the folder itself stays. What cannot go stays."""
    for path in (folder.iterdir() if folder.is_dir() else ()) if keep else (folder,):
        with contextlib.suppress(OSError):  # a read-only place: why it was not made is what is to be told
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def make_name(text: str) -> str:
    """Return a text as a name for params.yaml: `My Pets (2026)` is `my-pets-2026`; of nothing usable, `photos`."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:63].strip("-") or DEFAULT_EXAMPLE


def _fill(folder: Path, example: str, name: str | None) -> None:
    from visionloop.params import load_params
    from visionloop.pipeline import init_dvc, refresh_code

    make_tool_folders(folder)
    templates = resources.files("visionloop.examples")
    for source, target in COMMON.items():
        (folder / target).write_bytes((templates / source).read_bytes())
    for template in (templates / example).iterdir():
        (folder / template.name).write_bytes(template.read_bytes())
    if name:
        path = folder / "params.yaml"
        path.write_text(path.read_text().replace(f"name: {example}", f"name: {name}", 1))
    refresh_code(folder, load_params(folder / "params.yaml"))
    _run_git(folder, "init", "-q", "-b", "main")
    init_dvc(folder)
    _run_git(folder, "add", "--all", ".")  # dvc stages what it writes: the rest too, so that `git commit` has all of it


def _run_git(folder: Path, *words: str) -> None:
    with contextlib.suppress(OSError):  # no git on the PATH
        subprocess.run(["git", *words], cwd=folder, check=False, capture_output=True)


@dataclass(frozen=True)
class Workspace:
    """One workspace, opened: where everything is, what changes results, the store, and MLflow."""

    settings: Settings
    params: "Params"
    store: "ObjectStore"
    tracking: "Tracking"

    @property
    def name(self) -> str:
        """The name of dataset, registered model, ledger and MLflow experiment."""
        return self.params.name


def open_workspace(start: Path | None = None) -> Workspace:
    """Open the workspace at `start`, and keep other tools inside it. For entry points.

    Without `start`, the one that VISIONLOOP_HOME names, or that the current folder is in.

    Raises:
        SettingsError, ParamsError: there is no workspace, or its parameters are wrong.
    """
    from visionloop.params import load_params

    settings = load_settings(os.environ, start)
    apply_tool_environment(settings.home)
    warnings.filterwarnings("ignore", module=r"(mlflow|pytorch_lightning|lightning|torch|PIL)(\..*)?")
    return connect(settings, load_params(settings.params_path))


def connect(
    settings: Settings, params: "Params", *, store: "ObjectStore | None" = None, tracking: "Tracking | None" = None
) -> Workspace:
    """Return the workspace with its store and its MLflow: those given, else those that the settings name."""
    from visionloop.store import open_store
    from visionloop.tracking import MlflowTracking

    return Workspace(
        settings,
        params,
        store or open_store(settings.store_url),
        tracking or MlflowTracking(settings.tracking_uri, settings.artifact_root, params.name, get_user()),
    )


def get_now() -> str:
    """Return the time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def get_user() -> str:
    """Return who runs this, for the ledger."""
    try:
        return os.environ.get("VISIONLOOP_USER") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
