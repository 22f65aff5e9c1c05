"""Encoders: of the parameters (a backbone with its weights), or of a bundle (its `embedding` output).

.visionloop/encoders/<digest of weights, network and versions>.onnx    the exported backbone
.visionloop/encoders/<digest of what it was asked by>.json             what that came to: known again without torch
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from visionloop import networks
from visionloop.bundle import Bundle, hash_file
from visionloop.data.images import MAX_PIXELS, UInt8Array, load_array
from visionloop.data.shards import Prepared
from visionloop.errors import BundleError, TrainingError
from visionloop.features.runtimes import (
    Run,
    find_accelerator,
    list_candidates,
    list_versions,
    measure_runtimes,
    set_runtime,
)
from visionloop.features.view import VERSION, EncoderFacts, FloatArray, describe_crop
from visionloop.networks.processor import MACHINE_FILE
from visionloop.params import Train
from visionloop.predictor import Embedder
from visionloop.records import compute_digest
from visionloop.workspace import Workspace

# What decides over random weights, over those of the hub, and over the exported file.
LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnxscript")


@dataclass(frozen=True)
class Encoder:
    """Maps images to embeddings. Its network is loaded when it is first run. `open_network` makes what runs it."""

    facts: EncoderFacts
    open_network: Callable[[], Run] = field(repr=False)

    @cached_property
    def _run(self) -> Run:
        return self.open_network()

    def embed(self, images_nhwc: UInt8Array) -> FloatArray:
        """Map uint8 images (n, h, w, 3) to embeddings (n, d). Raises BundleError, ParamsError."""
        return self._run(images_nhwc)

    def decode(self, data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> UInt8Array:
        """Turn encoded bytes into the encoder's input (h, w, 3). Raises ImageError."""
        facts = self.facts
        return load_array(data, where, size_hw=facts.image_size, resize=facts.resize, max_pixels=max_pixels)


def make_encoder(
    workspace: Workspace, prepared: Prepared, *, tell: Callable[[str], None] = lambda line: None
) -> Encoder:
    """Return the encoder of `train.backbone` and `train.weights` for images as they are prepared.

    The first time torch is loaded to look at the weights, and with `embed.runtime: auto` what can run them is timed;
    what comes of both is kept in the workspace.

    Raises:
        TrainingError: the backbone or its weights are unusable.
        ParamsError: the runtime cannot be had.
    """
    settings = workspace.settings
    section = workspace.params.train
    wanted = workspace.params.embed.runtime
    accelerator = find_accelerator(wanted)
    candidates = list_candidates(wanted, accelerator)
    folder = settings.hidden_dir / "encoders"
    asked = folder / f"{_digest_question(section, prepared.size_hw, settings.home)}.json"
    weights_digest = _read_answer(asked)
    if weights_digest is None:
        weights_digest = _examine_backbone(section, prepared.size_hw, settings.home)
        _write_atomically(asked, lambda path: path.write_text(json.dumps({"weights_digest": weights_digest})))
    facts = EncoderFacts(
        source="params",
        backbone=section.backbone,
        weights=section.weights,
        weights_digest=weights_digest,
        image_size=prepared.size_hw,
        resize=prepared.resize,
        runtime="",
        precision="",
        crop=describe_crop(prepared),
    )
    open_run = partial(_open_backbone, folder, section, settings.home)
    choice = candidates[0]
    if len(candidates) > 1:
        measured = measure_runtimes(
            facts,
            candidates,
            prepared,
            accelerator=accelerator,
            hidden_dir=settings.hidden_dir,
            open_run=open_run,
        )
        tell(f"embeds by {measured.describe()} (measured once, kept in .visionloop/{MACHINE_FILE})")
        choice = measured.choice
    facts = set_runtime(facts, choice)
    return Encoder(facts, partial(open_run, facts))


def describe_weights(section: Train) -> str:
    """Return a warning where the encoder never learned anything; else nothing."""
    if section.weights != "none":
        return ""
    return f"train.weights is none: this {section.backbone} is random, near images share colours rather than meaning"


def make_bundle_encoder(bundle: Bundle, *, runtime: str = "auto") -> Encoder:
    """Return the encoder that a bundle's network is, for images as its card prepares them. Raises ParamsError.

    In fp32, as it is served; `auto` is ONNX Runtime, and so is torch, which cannot run a bundle.
    """
    if runtime == "openvino":
        list_candidates(runtime, "cpu")  # is it there?
    else:
        runtime = "onnxruntime"
    card = bundle.card
    facts = EncoderFacts(
        source=bundle.digest,
        backbone=str(card.network.get("backbone", "a network")),
        weights="",
        weights_digest=bundle.files.get("model.onnx", ""),
        image_size=(card.image_size[0], card.image_size[1]),
        resize=card.resize,
        runtime=runtime,
        precision="fp32",
    )
    model = bundle.folder / "model.onnx"
    return Encoder(facts, lambda: Embedder(model, runtime=runtime).embed)


def _digest_question(section: Train, size_hw: tuple[int, int], home: Path) -> str:
    """Return the digest of all that decides over the weights, as far as it can be known without loading them."""
    path = (home / Path(section.weights).expanduser()).resolve()
    is_file = section.weights not in {"none", "default"} and path.is_file()
    parts = [section.backbone, section.weights, section.weights_sha256, section.seed, list(size_hw), VERSION]
    code = {source.name: hash_file(source) for source in Path(networks.__path__[0]).glob("*.py")}
    return compute_digest([*parts, hash_file(path) if is_file else "", code, list_versions(LIBRARIES)])


def _read_answer(path: Path) -> str | None:
    try:
        digest = json.loads(path.read_text())["weights_digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _examine_backbone(section: Train, size_hw: tuple[int, int], home: Path) -> str:
    """Load the backbone, and return the digest of its weights. Raises TrainingError."""
    from visionloop.networks.export import compute_weights_digest
    from visionloop.networks.weights import load_backbone

    return compute_weights_digest(load_backbone(section, size_hw, home)[0])


def _open_backbone(folder: Path, section: Train, home: Path, facts: EncoderFacts) -> Run:
    """Make what runs the backbone: torch, or another runtime on its export. Raises TrainingError, BundleError."""
    name = compute_digest(
        [facts.weights_digest, facts.backbone, list(facts.image_size), VERSION, list_versions(LIBRARIES)]
    )
    model = folder / f"{name}.onnx"
    if facts.runtime != "torch" and model.is_file():
        try:
            return Embedder(model, runtime=facts.runtime, precision=facts.precision).embed
        except BundleError:  # damaged: exported again
            model.unlink()
    from visionloop.networks.export import (
        EmbeddingNetwork,
        TorchEncoder,
        compute_weights_digest,
        export_encoder,
        has_gpu,
    )
    from visionloop.networks.weights import load_backbone

    backbone, num_features = load_backbone(section, facts.image_size, home)
    if compute_weights_digest(backbone) != facts.weights_digest:
        raise TrainingError("params.yaml train.weights", "changed while they were used", "the same weights all along")
    network = EmbeddingNetwork(backbone, num_features)
    if facts.runtime == "torch":
        return TorchEncoder(network, device="cuda" if has_gpu() else "cpu", precision=facts.precision).embed
    _write_atomically(model, lambda path: export_encoder(network, facts.image_size, path))
    return Embedder(model, runtime=facts.runtime, precision=facts.precision).embed


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
