"""`visionloop new`: a workspace of one's own, so that nobody forks the repository to train on their photos."""

import shutil
import subprocess
from importlib import resources
from pathlib import Path

from visionloop.errors import SettingsError
from visionloop.params import load_params
from visionloop.pipeline import init_dvc, refresh_code
from visionloop.settings import make_tool_folders

COMMON = {"dvc.yaml": "dvc.yaml", "gitignore": ".gitignore"}


def list_examples() -> list[str]:
    """Return the names of the examples, sorted."""
    return sorted(p.name for p in resources.files("visionloop.examples").iterdir() if (p / "params.yaml").is_file())


def make_workspace(folder: Path, example: str, *, name: str | None = None) -> Path:
    """Make a workspace: params.yaml, dvc.yaml, .gitignore, code.json; git and dvc initialised. Return its folder.

    Raises:
        SettingsError: there is no such example, or the folder is not empty.
        ParamsError: the name is not usable.
    """
    if example not in list_examples():
        raise SettingsError("visionloop new --example", f"got {example!r}", f"one of {', '.join(list_examples())}")
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"workspace {folder}", "is not empty", "a new or empty folder", "Choose another one.")
    existed = folder.exists()
    try:
        _fill(folder, example, name)
    except BaseException:
        shutil.rmtree(folder)
        if existed:
            folder.mkdir()
        raise
    return folder


def _fill(folder: Path, example: str, name: str | None) -> None:
    make_tool_folders(folder)
    templates = resources.files("visionloop.examples")
    for source, target in COMMON.items():
        (folder / target).write_bytes((templates / source).read_bytes())
    for template in (templates / example).iterdir():
        (folder / template.name).write_bytes(template.read_bytes())
    if name:
        path = folder / "params.yaml"
        path.write_text(path.read_text().replace(f"name: {example}", f"name: {name}", 1))
    load_params(folder / "params.yaml")
    refresh_code(folder)
    if not (folder / ".git").exists():
        subprocess.run(["git", "init", "-q", "-b", "main"], cwd=folder, check=False, capture_output=True)
    init_dvc(folder)
