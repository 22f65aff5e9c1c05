"""What `train.backbone` and `train.weights` may say, checked without loading torch, which takes seconds."""

import ast
import difflib
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from visionloop.errors import TrainingError

OWN_NAMES = ("depthwise_cnn", "small_cnn")
OFFERED = ("resnet18", "mobilenet_v3_large")  # where no name is near
WEIGHTS = "params.yaml train.weights"
TODO = "Set train.weights to a file of a state dict (.safetensors or .pth), or to none."
REMOTE = ("s3://", "https://", "http://")


def read_backbone_names() -> list[str]:
    """Return the names of all backbones, sorted: our own, and what torchvision's files register."""
    spec = find_spec("torchvision")  # of a package at the top: found without running it
    folders = spec.submodule_search_locations if spec else None
    names = set(OWN_NAMES)
    for folder in folders or ():
        for path in Path(folder, "models").glob("*.py"):
            names.update(_find_registered(path.read_text(encoding="utf-8")))
    return sorted(names)


def check_backbone(name: str, names: Collection[str]) -> None:
    """Raise TrainingError, with the nearest names, unless a backbone is one of `names`."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or OFFERED
        expected = f"a known backbone; near: {', '.join(near)}"
        raise TrainingError("params.yaml train.backbone", f"got {name!r}", expected, "Edit the file.")


def check_weights(weights: str, home: Path) -> None:
    """Raise TrainingError if `train.weights` is a file, and there is none."""
    if weights not in ("none", "default") and not weights.startswith(REMOTE):
        path = resolve_path(weights, home)
        if not path.is_file():
            raise TrainingError(WEIGHTS, f"{path} does not exist", "none, default or a file", TODO)


def resolve_path(weights: str, home: Path) -> Path:
    """Return the absolute path of a file of weights; a relative one begins at the workspace."""
    return (home / Path(weights).expanduser()).resolve()


def _find_registered(source: str) -> list[str]:
    """Return the names under which a file of torchvision registers networks: `@register_model()` before a function.

    A name in the parentheses stands for that of the function.
    """
    if "register_model" not in source:
        return []
    names = []
    for node in ast.parse(source).body:
        for call in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register_model":
                given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "name")]
                names.append(ast.literal_eval(given[0]) if given else node.name)  # type: ignore[attr-defined]
    return names
