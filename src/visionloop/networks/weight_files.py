"""Files of weights: names and tensors, nothing unpickled. A file is known by how it begins, not by its name."""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionloop.errors import TrainingError

WHERE = "params.yaml train.weights"
SUPPLY = "Set train.weights to a file of a state dict (.safetensors or .pth), or to none."
# Where training scripts put the state dict in their checkpoints.
INNER = ("state_dict", "model_state_dict", "model")
# DenseNet's published weights were saved under older names: `norm.1.weight` is `norm1.weight` (as torchvision does).
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")

State = dict[str, Tensor]


def read_weights(path: Path) -> State:
    """Read a safetensors file or a state dict that torch saved.

    Raises:
        TrainingError: there is no such file, or it holds something else than names and tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
        loaded = _load(path, head)
    except FileNotFoundError as exc:
        raise TrainingError(WHERE, f"{path} does not exist", "none, default or a file", SUPPLY) from exc
    except Exception as exc:  # of a damaged or hostile file: zip, pickle, header, memory
        if isinstance(exc, TrainingError):
            raise
        why = _explain(exc)
        raise TrainingError(WHERE, f"{path.name} cannot be read as weights ({why})", "tensors alone", SUPPLY) from exc
    state = _find_state(loaded)
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise TrainingError(WHERE, f"{path.name} holds no state dict", "names and tensors", SUPPLY)
    return {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}


def _load(path: Path, head: bytes) -> Any:
    if head[8:9] == b"{":
        from safetensors.torch import load_file

        return load_file(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, "cpu", weights_only=True)
    begins = head.split(b"\n")[0].decode("ascii", "replace").strip() or "nothing"
    raise TrainingError(
        WHERE,
        f"{path.name} cannot be read as weights (it begins with {begins!r})",
        "a safetensors file or one that torch.save wrote",
        SUPPLY,
    )


def _find_state(loaded: Any) -> dict[Any, Any] | None:
    if not isinstance(loaded, dict):
        return None
    return next((loaded[key] for key in INNER if isinstance(loaded.get(key), dict)), loaded)


def _explain(exc: Exception) -> str:
    if isinstance(exc, pickle.UnpicklingError):
        return "it holds more than tensors, or is damaged"
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:120].rstrip(".")
