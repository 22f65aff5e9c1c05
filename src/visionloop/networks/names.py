"""What `train.backbone` and `train.weights` may say, checked without loading torch, which takes seconds."""

import ast
import difflib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from visionloop.errors import TrainingError
from visionloop.params.train import REMOTE, Train

LITE0 = "efficientnet_lite0"
OWN_NAMES = ("depthwise_cnn", LITE0, "small_cnn")
OFFERED = (LITE0, "resnet18", "mobilenet_v3_large")  # where no name is near
TIMM = "timm/"
_TIMM_NAME = re.compile(r"^@register_model(?:\(\))?\s*\ndef (\w+)\(", re.MULTILINE)
WEIGHTS, BACKBONE = "params.yaml train.weights", "params.yaml train.backbone"
TODO = "Set train.weights to a file of a state dict (.safetensors or .pth), or to none."
ENCODER_TODO = "Set train.backbone to the file of an ONNX encoder, or to a name like efficientnet_lite0."


@lru_cache
def read_backbones() -> dict[str, str]:
    """Return all backbones: name to library (own, torchvision, timm), in this order, then by name.

    The names of timm are also there as `timm/NAME`: where torchvision has the same, that is how timm's is meant.
    """
    torchvision = {name for text in _read_models("torchvision") for name in _find_registered(text)}
    timm = {name for text in _read_models("timm") for name in _TIMM_NAME.findall(text)}
    found = dict.fromkeys(OWN_NAMES, "own")
    found |= dict.fromkeys(sorted(torchvision), "torchvision")
    return found | dict.fromkeys([*sorted(timm - set(found)), *sorted(TIMM + name for name in timm)], "timm")


def check_backbone(name: str) -> str:
    """Return the library of a backbone. Of timm's names the part behind a dot chooses among published weights.

    Raises:
        TrainingError: there is none of this name; the nearest are named.
    """
    known = read_backbones()
    base, dot, _ = name.partition(".")
    if base in known and (not dot or known[base] == "timm"):
        return known[base]
    near = _find_near(name, known)
    if dot and TIMM + base in known:  # a tag of timm's weights, behind a name that is not timm's
        near = [*[base][: base in known], f"{TIMM}{base} and a tag of its weights"]
    expected = f"a known backbone; near: {', '.join(near or OFFERED)}"
    raise TrainingError(BACKBONE, f"got {name!r}", expected, "Edit the file.")


def _find_near(name: str, known: Mapping[str, str]) -> list[str]:
    """Return the three nearest names: first those with the same letters in another order, and timm's last."""
    near: list[str] = []
    for library in ("own", "torchvision", "timm"):
        names = [each for each, of in known.items() if of == library and not each.startswith(TIMM)]
        near += difflib.get_close_matches(name, names, n=3)
    return sorted(near, key=lambda each: sorted(each) != sorted(name))[:3]


def check_network(section: Train, home: Path) -> None:
    """Raise TrainingError if there is no network of this name, or no such file of an encoder or of weights."""
    if section.is_onnx:
        if not section.backbone.startswith(REMOTE):
            _check_file(BACKBONE, section.backbone, home, "the file of an ONNX encoder", ENCODER_TODO)
        return
    check_backbone(section.backbone)
    if section.weights not in ("none", "default") and not section.weights.startswith(REMOTE):
        _check_file(WEIGHTS, section.weights, home, "none, default or a file", TODO)


def _check_file(where: str, name: str, home: Path, expected: str, todo: str) -> None:
    path = resolve_path(name, home)
    if not path.is_file():
        raise TrainingError(where, f"{path} does not exist", expected, todo)


def resolve_path(name: str, home: Path) -> Path:
    """Return the absolute path of a file that params.yaml names; a relative one begins at the workspace."""
    return (home / Path(name).expanduser()).resolve()


def _read_models(library: str) -> Iterator[str]:
    """Yield the source of each file that has a library's networks; of one that is not installed, none."""
    spec = find_spec(library)  # of a package at the top: found without running it
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder, "models").glob("*.py")):
            yield path.read_text(encoding="utf-8")


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
