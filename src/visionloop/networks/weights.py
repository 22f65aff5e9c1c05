"""Pretrained weights of a backbone: none, published ones, a file, or one from a bucket or the web."""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionloop.bundle import hash_file
from visionloop.errors import TrainingError, shorten
from visionloop.networks.backbones import describe_preprocessing, make_backbone
from visionloop.networks.classifier import EncodedClassifier
from visionloop.networks.names import LITE0, TODO, check_backbone, resolve_path
from visionloop.networks.names import WEIGHTS as WHERE
from visionloop.networks.weight_sources import State, find_published, find_weights, read_weights, rename_lite0
from visionloop.params import REMOTE, Train
from visionloop.records import compute_digest
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
    """Load `none`, `default` (the best published for this network), a file or a URI into a backbone, in place.

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
    state = rename_lite0(state) if name == LITE0 else state
    state = _strip_prefix(state, wanted, origin)
    library = check_backbone(name)
    if library == "timm":
        state = _convert_for_timm(backbone, state)
    elif name.startswith("vit_"):
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


def _convert_for_timm(backbone: nn.Module, state: State) -> State:
    """Rename and interpolate as timm does when it loads published weights; as they are where it has no rule for them.

    Many of its files have such a rule for their networks: names from before, positions of another image size.
    """
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    try:
        converted = convert(dict(state), backbone) if convert else state
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError):
        return state
    return {name: tensor for name, tensor in converted.items() if isinstance(tensor, torch.Tensor)}


def describe_start(section: Train, size_hw: tuple[int, int]) -> list[str]:
    """Return what a person should know of `weights: default`: their licence, and the image size they were made for.

    Raises:
        TrainingError: there is no such network.
    """
    published = find_published(section.backbone) if section.weights == "default" and not section.is_onnx else None
    if published is None:
        return []
    licence = f"licence {published.license}" if published.license != "not stated" else "licence not stated"
    warning = "" if published.is_for_everybody else ", which does not allow every use: read it"
    lines = [f"weights of {section.backbone} as published ({licence}{warning})"]
    side_px = describe_preprocessing(section.backbone).side_px
    if side_px and side_px > 1.5 * max(size_hw):
        lines.append(
            f"these weights know images of {side_px} x {side_px}; prepare.image_size is {size_hw[0]} x {size_hw[1]}, "
            "which will cost accuracy"
        )
    return lines


def describe_network(section: Train, classifier: nn.Module) -> dict[str, Any]:
    """Return what the card of a model says of its network: pixels it wants, and the licence of published weights."""
    if isinstance(classifier, EncodedClassifier):
        return classifier.card
    facts: dict[str, Any] = {"preprocessing": describe_preprocessing(section.backbone).to_json()}
    published = find_published(section.backbone) if section.weights == "default" else None
    if published:
        facts["weights"] = {"file": published.file_name, "license": published.license}
    return facts


def hash_weights(section: Train, home: Path) -> str:
    """Return the digest of the weights to start from, so that another file under the same name is another input."""
    if section.is_onnx:
        files = [hash_file(path) for path in section.list_files(home) if path.is_file()]
        return compute_digest([section.backbone_sha256, files])
    if section.weights == "default":
        published = find_published(section.backbone)
        return published.file_name if published else ""
    if section.weights_sha256:
        return section.weights_sha256
    path = resolve_path(section.weights, home)
    return hash_file(path) if section.weights != "none" and path.is_file() else ""
