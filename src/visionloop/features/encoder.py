"""Encoders: of the parameters (a backbone with its weights, an ONNX file), or of a bundle (its `embedding` output).

.visionloop/encoders/<digest of weights, network and versions>.onnx    the network, from uint8 images to embeddings
.visionloop/encoders/<digest of what it was asked by>.json             what that came to: known again without torch

Dimensions: n images, d features.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from visionloop import networks
from visionloop.bundle import Bundle, hash_file
from visionloop.data.images import UInt8Array, load_array
from visionloop.data.shards import Prepared
from visionloop.errors import BundleError, TrainingError
from visionloop.features.runtimes import (
    Run,
    find_accelerator,
    list_candidates,
    measure_runtimes,
    set_runtime,
)
from visionloop.features.view import VERSION, EncoderFacts, FloatArray, describe_crop
from visionloop.networks.frozen import FrozenNetwork, load_frozen
from visionloop.networks.names import BACKBONE
from visionloop.networks.processor import MACHINE_FILE, list_versions
from visionloop.params import Train
from visionloop.predictor import Embedder
from visionloop.records import MAX_PIXELS, compute_digest
from visionloop.workspace import Workspace

if TYPE_CHECKING:
    import onnx

    from visionloop.networks.frozen import OnnxEncoder

# What decides over random weights, over those of the hub, and over the exported file.
LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnxscript")
# The keys of `train` that do.
ASKED = {"backbone", "backbone_sha256", "output", "preprocessing", "weights", "weights_sha256", "seed"}
# An ONNX encoder is tried on so many images; vectors agree within this share of the largest number.
TRIED, AGREE = 3, 1e-2


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
    accelerator = "cpu" if section.is_onnx else find_accelerator(wanted)
    candidates = list_candidates(wanted, accelerator, has_torch=not section.is_onnx)
    folder = settings.hidden_dir / "encoders"
    asked = folder / f"{_digest_question(section, prepared.size_hw, settings.home)}.json"
    answer = _read_answer(asked)
    if answer is None:
        network = load_frozen(section, prepared.size_hw, settings.home)
        if section.is_onnx:
            _try_encoder(cast("OnnxEncoder", network), folder)
        answer = _Answer(network.weights_digest, network.describe())
        _write_atomically(asked, partial(_write_answer, answer))
    for line in answer.lines:
        tell(line)
    facts = EncoderFacts(
        source="params",
        backbone=section.network_name,
        weights=section.weights,
        weights_digest=answer.weights_digest,
        image_size=prepared.size_hw,
        resize=prepared.resize,
        runtime="",
        precision="",
        crop=describe_crop(prepared),
    )
    open_run = partial(_open_network, folder, section, settings.home)
    choice = candidates[0]
    if len(candidates) > 1:
        measured = measure_runtimes(
            facts,
            candidates,
            prepared,
            accelerator=accelerator,
            hidden_dir=settings.hidden_dir,
            open_run=open_run,
            tell=tell,
        )
        tell(f"embeds by {measured.describe()} (measured once, kept in .visionloop/{MACHINE_FILE})")
        choice = measured.choice
    facts = set_runtime(facts, choice)
    return Encoder(facts, partial(open_run, facts))


def describe_weights(section: Train) -> str:
    """Return a warning where the encoder never learned anything; else nothing."""
    if section.weights != "none" or section.is_onnx:
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
    files = [hash_file(path) if path.is_file() else "" for path in section.list_files(home)]
    network = section.model_dump(mode="json", include=ASKED)
    code = {source.name: hash_file(source) for source in Path(networks.__path__[0]).glob("*.py")}
    return compute_digest([network, list(size_hw), VERSION, files, code, list_versions(LIBRARIES)])


@dataclass(frozen=True)
class _Answer:
    """What a network came to: the digest of its weights, and what a person should read of it."""

    weights_digest: str
    lines: list[str]


def _read_answer(path: Path) -> _Answer | None:
    try:
        value = json.loads(path.read_text())
        answer = _Answer(value["weights_digest"], [str(line) for line in value["lines"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if isinstance(answer.weights_digest, str) and len(answer.weights_digest) == 64 else None


def _write_answer(answer: _Answer, path: Path) -> None:
    path.write_text(json.dumps(asdict(answer)))


def _try_encoder(network: "OnnxEncoder", folder: Path) -> None:
    """Run an ONNX encoder on a few images: all at once they must give what each gives alone.

    Raises:
        TrainingError: it does not run, or not on any number of images, or was not the same before it was raised.
    """
    images_nhwc = np.random.default_rng(0).integers(0, 256, (TRIED, *network.size_hw, 3), dtype=np.uint8)
    name = network.name
    run = _open_graph(network.model, folder, name)
    alone_nd = _run_graph(run, images_nhwc, name, 1)
    if network.given is not None:
        before_nd = _run_graph(_open_graph(network.given, folder, name), images_nhwc, name, 1)
        if not _agree(before_nd, alone_nd):
            todo = "Export it with opset 18 or later."
            raise TrainingError(BACKBONE, f"{name} gives other vectors once its operators are raised", "the same", todo)
    try:
        together_nd = _run_graph(run, images_nhwc, name, TRIED)
    except TrainingError:
        together_nd = alone_nd[:0]
    if not _agree(together_nd, alone_nd):
        found, todo = f"{name} gives an image another vector when others are beside it", "Take out what mixes images."
        if network.pixels.batch or not len(together_nd):
            found = f"{name} does not take {TRIED} images at once (exported for {network.pixels.batch or 'any number'})"
            todo = "Export it with a dynamic batch (`dynamic_shapes`, or `dynamic_axes` of older exporters)."
        raise TrainingError(BACKBONE, found, "the same vector for an image whatever is beside it", todo)


def _open_graph(model: Any, folder: Path, name: str) -> Run:
    """Make what runs a graph in ONNX Runtime, by way of a file that is removed. Raises TrainingError."""
    from visionloop.networks.onnx_graph import to_bytes

    path = folder / f"tried-{os.getpid()}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_bytes(to_bytes(model))
        return Embedder(path).embed
    except BundleError as exc:
        todo = "Export it again with the current version of its exporter."
        found = f"{name} {exc.found.removeprefix('model.onnx ')}"
        raise TrainingError(BACKBONE, found, exc.expected or "a graph that runs", todo) from exc
    finally:
        path.unlink(missing_ok=True)


def _run_graph(run: Run, images_nhwc: UInt8Array, name: str, step: int) -> FloatArray:
    """Return the embeddings (n, d) of images, so many at a time. Raises TrainingError."""
    try:
        return np.concatenate([run(images_nhwc[i : i + step]) for i in range(0, len(images_nhwc), step)])
    except Exception as exc:  # onnxruntime raises classes of its own, from C++
        size = "{} x {}".format(*images_nhwc.shape[1:3])
        why = " ".join(str(exc).split())[-160:]
        todo = "Set prepare.image_size to the size that it was made for, or export it for this one."
        raise TrainingError(BACKBONE, f"{name} cannot run on images of {size} ({why})", "a vector", todo) from exc


def _agree(ours_nd: FloatArray, theirs_nd: FloatArray) -> bool:
    if ours_nd.shape != theirs_nd.shape:
        return False
    return bool(np.allclose(ours_nd, theirs_nd, rtol=0, atol=AGREE * max(1e-6, float(np.abs(theirs_nd).max()))))


def _open_network(folder: Path, section: Train, home: Path, facts: EncoderFacts) -> Run:
    """Make what runs the network: torch, or another runtime on its graph. Raises TrainingError, BundleError."""
    model = _place_graph(folder, facts)
    if facts.runtime != "torch" and model.is_file():
        try:
            return Embedder(model, runtime=facts.runtime, precision=facts.precision).embed
        except BundleError:  # damaged: exported again
            model.unlink()
    network = load_frozen(section, facts.image_size, home)
    if network.weights_digest != facts.weights_digest:
        key = "backbone" if section.is_onnx else "weights"
        raise TrainingError(f"params.yaml train.{key}", "changed while it was used", "the same file all along")
    if facts.runtime == "torch":
        from visionloop.networks.export import EmbeddingNetwork, TorchEncoder, has_gpu

        assert isinstance(network, EmbeddingNetwork)
        return TorchEncoder(network, device="cuda" if has_gpu() else "cpu", precision=facts.precision).embed
    _write_atomically(model, network.write)
    return Embedder(model, runtime=facts.runtime, precision=facts.precision).embed


def load_graph(hidden_dir: Path, facts: EncoderFacts, network: FrozenNetwork) -> "onnx.ModelProto":
    """Return the graph of a network: as `embed` exported it, else exported now. What holds a head is joined to it."""
    import onnx

    from visionloop.networks.onnx_graph import read_num_features

    path = _place_graph(hidden_dir / "encoders", facts)
    for _ in range(2):
        if not path.is_file():
            _write_atomically(path, network.write)
        try:
            model = onnx.load(path)
            read_num_features(model)  # of an empty file there is a model, which has no output
        except Exception:  # protobuf's DecodeError has no public home
            path.unlink()
        else:
            return model
    raise BundleError(f"encoder {path.name[:12]}", "cannot be read after it was written", "an ONNX file")


def _place_graph(folder: Path, facts: EncoderFacts) -> Path:
    parts = [facts.weights_digest, facts.backbone, list(facts.image_size), VERSION, list_versions(LIBRARIES)]
    return folder / f"{compute_digest(parts)}.onnx"


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
