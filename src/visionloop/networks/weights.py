"""Pretrained weights of a backbone: torchvision's hub, or a file (safetensors, a state dict). Nothing is unpickled."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from visionloop.bundle import hash_file
from visionloop.errors import TrainingError, shorten
from visionloop.networks.backbones import make_backbone
from visionloop.params import Train

WHERE = "params.yaml train.weights"
SUPPLY = "Set train.weights to a file of a state dict (.safetensors or .pth), or to none."


def load_backbone(section: Train, size_hw: tuple[int, int], home: Path) -> tuple[nn.Module, int]:
    """Build the backbone of `train.backbone` with the weights of `train.weights`; return it and its number of features.

    Seeds torch with `train.seed`, so that random weights are the same in every stage. Raises TrainingError.
    """
    torch.manual_seed(section.seed)
    backbone, num_features = make_backbone(section.backbone, size_hw)
    load_weights(backbone, section.backbone, section.weights, home)
    return backbone.to(memory_format=torch.channels_last), num_features


def load_weights(backbone: nn.Module, name: str, weights: str, home: Path) -> None:
    """Load `none`, `default` (torchvision's best for this model) or a file into a backbone, in place.

    The file's head may have any number of classes: it is not used.

    Raises:
        TrainingError: no network, no such file, not a state dict, or of another network.
    """
    if weights == "none":
        return
    state = _download(name) if weights == "default" else _read_file((home / Path(weights).expanduser()).resolve())
    wanted = backbone.state_dict()
    missing = [key for key in wanted if key not in state]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or wrong:
        raise TrainingError(
            WHERE,
            f"{weights!r} does not fit {name}: {len(missing)} tensors missing, {len(wrong)} of another shape "
            f"({shorten(missing + wrong, 3)})",
            f"the state dict of a {name}",
            SUPPLY,
        )
    backbone.load_state_dict({key: state[key] for key in wanted})


def _download(name: str) -> dict[str, Tensor]:
    try:
        chosen: Any = models.get_model_weights(name).DEFAULT
        return dict(chosen.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as exc:  # URLError is an OSError; a wrong hash a RuntimeError
        raise TrainingError(WHERE, f"cannot download the weights of {name} ({exc})", "a network", SUPPLY) from exc
    except ValueError as exc:
        raise TrainingError(WHERE, f"there are no default weights for {name}", "none or a file", SUPPLY) from exc


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise TrainingError(WHERE, f"{path} does not exist", "none, default or a file", SUPPLY) from exc
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as exc:
        raise TrainingError(WHERE, f"{path.name} cannot be read as weights", "tensors alone", SUPPLY) from exc
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TrainingError(WHERE, f"{path.name} holds no state dict", "names and tensors", SUPPLY)
    return {key.removeprefix("backbone."): value for key, value in state.items()}


def hash_weights(section: Train, home: Path) -> str:
    """Return the digest of the weights to start from, so that another file under the same name is another input."""
    if section.weights_sha256:
        return section.weights_sha256
    path = (home / Path(section.weights).expanduser()).resolve()
    return hash_file(path) if section.weights not in {"none", "default"} and path.is_file() else ""
