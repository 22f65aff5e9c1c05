"""Pretrained weights of a backbone: none, torchvision's, a file, or one from a bucket or the web."""

import re
from pathlib import Path

import torch
from torch import nn

from visionloop.bundle import hash_file
from visionloop.errors import TrainingError, shorten
from visionloop.networks.backbones import make_backbone
from visionloop.networks.names import REMOTE, TODO, resolve_path
from visionloop.networks.names import WEIGHTS as WHERE
from visionloop.networks.weight_sources import State, find_hub_url, find_weights, read_weights
from visionloop.params import Train
from visionloop.secrets import mask

# A counter that no result depends on; files from before torch 0.4.1 have none.
_COUNTER = re.compile(r"\.num_batches_tracked$")


def load_backbone(section: Train, size_hw: tuple[int, int], home: Path) -> tuple[nn.Module, int]:
    """Build the backbone of `train.backbone` with the weights of `train.weights`; return it and its number of features.

    Seeds torch with `train.seed`, so that random weights are the same in every stage. Raises TrainingError.
    """
    torch.manual_seed(section.seed)
    backbone, num_features = make_backbone(section.backbone, size_hw)
    load_weights(backbone, section.backbone, section.weights, home, section.weights_sha256)
    return backbone.to(memory_format=torch.channels_last), num_features


def load_weights(backbone: nn.Module, name: str, weights: str, home: Path, sha256: str | None = None) -> None:
    """Load `none`, `default` (torchvision's best for this model), a file or a URI into a backbone, in place.

    The file's head may have any number of classes: it is not used.

    Raises:
        TrainingError: no network, no such file, other bytes than `sha256`, not a state dict, or of another network.
    """
    if weights != "none":
        shown = mask(weights) if weights.startswith(REMOTE) else weights
        fill_backbone(backbone, name, read_weights(find_weights(weights, name, sha256, home)), repr(shown))


def fill_backbone(backbone: nn.Module, name: str, state: State, origin: str) -> None:
    """Copy a state dict into a backbone; its names may have any prefix (`module.`, `backbone.`), and a head beside.

    Raises:
        TrainingError: tensors are missing, of another shape or not finite; `origin` names the file.
    """
    wanted = backbone.state_dict()
    state = _strip_prefix(state, wanted, origin)
    if name.startswith("vit_"):
        state = _fit_positions(backbone, state, wanted)
    missing = [key for key in wanted if key not in state and not _COUNTER.search(key)]
    wrong = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or wrong:
        raise TrainingError(
            WHERE,
            f"{origin} does not fit {name}: {len(missing)} tensors missing, {len(wrong)} of another shape "
            f"({shorten(missing + wrong, 3)})",
            f"the state dict of a {name}",
            TODO,
        )
    chosen = {key: state[key] for key in wanted if key in state}
    if broken := [key for key, tensor in chosen.items() if not torch.isfinite(tensor).all()]:
        raise TrainingError(WHERE, f"{origin} has values that are not finite ({shorten(broken, 3)})", "numbers", TODO)
    backbone.load_state_dict(chosen, strict=False)


def _strip_prefix(state: State, wanted: State, origin: str) -> State:
    """Take the part of a state dict that is this network, by the prefix under which most of its names are found."""
    last = list(wanted)[-1]
    prefixes = {key.removesuffix(last) for key in state if key.endswith(last)} | {""}
    found = {prefix: sum(prefix + key in state for key in wanted) for prefix in prefixes}
    best = sorted(prefix for prefix in prefixes if found[prefix] == max(found.values()))
    if len(best) > 1 and "" not in best and found[best[0]] == len(wanted):
        raise TrainingError(WHERE, f"{origin} holds several networks ({shorten(best)})", "one of them alone", TODO)
    prefix = "" if "" in best else best[0]
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _fit_positions(backbone: nn.Module, state: State, wanted: State) -> State:
    """Interpolate a vision transformer's positions where its weights were made for another image size."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    key = "encoder.pos_embedding"
    if key not in state or state[key].shape == wanted[key].shape or state[key].shape[-1] != wanted[key].shape[-1]:
        return state
    positions = {key: state[key]}
    fitted = interpolate_embeddings(int(backbone.image_size), int(backbone.patch_size), positions)  # type: ignore[arg-type]
    return {**state, key: fitted[key]}


def hash_weights(section: Train, home: Path) -> str:
    """Return the digest of the weights to start from, so that another file under the same name is another input."""
    if section.weights == "default":
        return (find_hub_url(section.backbone) or "").rsplit("/", 1)[-1]
    if section.weights_sha256:
        return section.weights_sha256
    path = resolve_path(section.weights, home)
    return hash_file(path) if section.weights != "none" and path.is_file() else ""
