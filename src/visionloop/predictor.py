"""Runs a bundle: images in, probabilities and embeddings out. The same code judges and serves. No torch.

Dimensions: n images, h height, w width, k classes, d embedding size.
"""

import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from visionloop.bundle import INT8_MODEL, MODEL, Bundle, check_onnx, download_bundle, load_bundle
from visionloop.confidence import (
    check_abstain,
    compute_difference,
    compute_distances,
    compute_probs,
    describe_doubt,
    find_abstained,
    get_limit,
    get_tolerance,
    is_number,
    pick_reference,
)
from visionloop.data.images import UInt8Array, load_array
from visionloop.data.inputs import ImageInput, load_input
from visionloop.errors import BundleError, ImageError, ParamsError, describe_install, shorten
from visionloop.parallel import map_parallel
from visionloop.records import LABEL_SEPARATOR, Card, Prediction
from visionloop.store import ObjectStore

# What may run a model: a runtime and the precision of its graph. The first judges; the card says which may serve.
FP32, INT8 = "onnxruntime fp32", "onnxruntime int8"
ENGINES = (FP32, INT8, "openvino fp32", "openvino bf16", "openvino int8")
CLOSE_PROBABILITY = 0.01
BATCH_IMAGES, BATCH_BYTES = 64, 32 * 1024 * 1024
# Images and pixels that an `Embedder` runs at a time: enough for all cores, and little memory.
MAX_SLICE, SLICE_PIXELS = 128, 16 * 224 * 224
TASKS = ("binary", "multiclass", "multilabel")
FloatArray = NDArray[np.float32]
# A model's answers: a class for each image (n,), or for multilabel a bool for each image and class (n, k).
Choices = NDArray[np.int64] | NDArray[np.bool_]
Answer = TypeVar("Answer")
Keep = Callable[[str, bytes, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Outputs:
    """The output of the network for n images: logits and probabilities (n, k), embeddings (n, d).

    `distance_n` is how far each is from the validation images, where the card has a rule for it. `abstained_n` says for
    which the model does not know.
    """

    logits_nk: FloatArray
    probs_nk: FloatArray
    embedding_nd: FloatArray
    abstained_n: NDArray[np.bool_]
    distance_n: FloatArray | None = None


def join_outputs(parts: Sequence[Outputs]) -> Outputs:
    """Put the outputs of several batches, one or more, one after the other."""
    distances = [p.distance_n for p in parts if p.distance_n is not None]
    return Outputs(
        np.concatenate([p.logits_nk for p in parts]),
        np.concatenate([p.probs_nk for p in parts]),
        np.concatenate([p.embedding_nd for p in parts]),
        np.concatenate([p.abstained_n for p in parts]),
        np.concatenate(distances) if distances else None,
    )


class Predictor:
    """One loaded model. Thread-safe. Create it after a fork, not before."""

    def __init__(self, bundle: Bundle, *, threads: int = 0, engine: str = FP32, keep: Keep | None = None) -> None:
        """Load the model of a checked bundle; `threads` 0 means all cores. Raises BundleError.

        `engine` is one of ENGINES: a runtime and a precision. A graph in int8 is a file of its own. `keep`: what
        opens the network, or knows what it gave for the same images before.
        """
        where = f"bundle {bundle.digest[:12]}"
        check_card(bundle.card, where)
        runtime, _, precision = engine.partition(" ")
        file = INT8_MODEL if precision == "int8" else MODEL
        if not (bundle.folder / file).is_file():
            raise BundleError(where, f"has no {file}", "the graph that is asked for")
        model_bytes = (bundle.folder / file).read_bytes()
        open_it = partial(_open, model_bytes, where, runtime, "bf16" if precision == "bf16" else "fp32", threads)
        self._session = keep(engine, model_bytes, open_it) if keep else open_it()
        self.bundle, self.engine = bundle, engine
        self._reference_rd = _load_reference(bundle, where) if get_limit(bundle.card, "distance") is not None else None

    @classmethod
    def load(cls, folder: Path, *, threads: int = 0, expected_digest: str | None = None) -> "Predictor":
        """Open the bundle in a folder: digests first, then the golden answers. Raises BundleError."""
        predictor = cls(load_bundle(folder, expected_digest=expected_digest), threads=threads)
        predictor.check_golden()
        return predictor

    @classmethod
    def fetch(cls, store: ObjectStore, digest: str, cache_dir: Path) -> "Predictor":
        """Open a bundle of the store, by way of a folder that keeps it. Raises BundleError, StoreError."""
        return cls.load(download_bundle(store, digest, cache_dir).folder, expected_digest=digest)

    @property
    def embedding_size(self) -> int:
        """The length d of an embedding, found by running the network once: its graph need not say it."""
        return int(self.run(np.zeros((1, *self.card.image_size, 3), np.uint8)).embedding_nd.shape[1])

    @property
    def card(self) -> Card:
        return self.bundle.card

    @property
    def digest(self) -> str:
        return self.bundle.digest

    def decode(self, data: bytes, where: str, *, max_pixels: int | None = None) -> UInt8Array:
        """Turn encoded bytes into this model's input (h, w, 3). `max_pixels` None: the card's. Raises ImageError."""
        limit = max_pixels or self.card.max_pixels
        return load_array(data, where, size_hw=self.card.image_size, resize=self.card.resize, max_pixels=limit)

    def decode_golden(self, images: Iterable[bytes]) -> UInt8Array:
        """Turn golden images, of any size, into this model's input (n, h, w, 3). Raises ImageError."""
        size_hw, resize = self.card.image_size, self.card.resize
        arrays = [load_array(data, "golden image", size_hw=size_hw, resize=resize, max_pixels=None) for data in images]
        return np.stack(arrays)

    def run(self, images_nhwc: UInt8Array) -> Outputs:
        """Run the network on n decoded images."""
        logits_nk, embedding_nd = self._session.run(["logits", "embedding"], {"images": images_nhwc})
        probs_nk, distance_n = compute_probs(logits_nk, self.card), None
        if self._reference_rd is not None:
            neighbours = int((self.card.abstain or {})["neighbours"])
            distance_n = compute_distances(embedding_nd, self._reference_rd, neighbours)
        abstained_n = find_abstained(compute_confidence(probs_nk, self.choose(probs_nk)), distance_n, self.card)
        return Outputs(logits_nk, probs_nk, embedding_nd, abstained_n, distance_n)

    def run_batches(self, images_nhwc: UInt8Array, *, batch_size: int | None = None) -> Outputs:
        """Run the network on any number of images, in batches. The larger the images, the smaller the batch."""
        batch_size = batch_size or choose_batch_size(images_nhwc.shape[1:3])
        parts = [self.run(images_nhwc[i : i + batch_size]) for i in range(0, len(images_nhwc), batch_size)]
        if not parts:
            empty = np.zeros((0, len(self.card.classes)), np.float32)
            return Outputs(empty, empty, np.zeros((0, 0), np.float32), np.zeros(0, bool))
        return join_outputs(parts)

    def choose(self, probs_nk: NDArray[np.floating]) -> Choices:
        """Return the answers for n images: a class each (n,), or for multilabel which of the classes (n, k)."""
        return choose_classes(probs_nk, self.card)

    def answer(self, outputs: Outputs) -> list[Prediction]:
        """Turn the network's outputs into one prediction for each image."""
        classes, chosen = self.card.classes, self.choose(outputs.probs_nk)
        confidence_n = compute_confidence(outputs.probs_nk, chosen)
        names = name_choices(chosen, classes)
        distance_n = outputs.distance_n if outputs.distance_n is not None else [None] * len(names)
        return [
            Prediction(
                prediction=LABEL_SEPARATOR.join(labels),
                probabilities={c: float(p) for c, p in zip(classes, probs_k, strict=True)},
                confidence=float(confidence),
                labels=labels if chosen.ndim == 2 else None,
                abstained=describe_doubt(float(confidence), distance, self.card) if abstained else None,
            )
            for labels, probs_k, confidence, abstained, distance in zip(
                names, outputs.probs_nk, confidence_n, outputs.abstained_n, distance_n, strict=True
            )
        ]

    def predict(self, images: Iterable[ImageInput]) -> list[Prediction]:
        """Answer for images. Raises ImageError for the first one that cannot be used."""
        return raise_errors(self.predict_each(images))

    def predict_each(self, images: Iterable[ImageInput]) -> Iterator[Prediction | ImageError]:
        """Yield each image's answer, or what is wrong with that image, in their order. Two batches are in memory."""
        return self._answer_each(images, self.answer)

    def embed_each(self, images: Iterable[ImageInput]) -> Iterator[FloatArray | ImageError]:
        """Yield each image's embedding (d,), or what is wrong with that image, as `predict_each`."""
        return self._answer_each(images, lambda outputs: list(outputs.embedding_nd))

    def _answer_each(
        self, images: Iterable[ImageInput], answer: Callable[[Outputs], Iterable[Answer]]
    ) -> Iterator[Answer | ImageError]:
        size = choose_batch_size(self.card.image_size)
        # The next batch is decoded while the network runs on this one.
        each = map_parallel(self._try_decode, enumerate(images), ahead=size)
        while decoded := list(islice(each, size)):
            arrays = [one for one in decoded if not isinstance(one, ImageError)]
            answers = iter(answer(self.run(np.stack(arrays))) if arrays else ())
            for one in decoded:
                yield one if isinstance(one, ImageError) else next(answers)

    def _try_decode(self, numbered: tuple[int, ImageInput]) -> UInt8Array | ImageError:
        number, image = numbered
        try:
            card, where = self.card, f"image {number}"
            return load_input(image, where, size_hw=card.image_size, resize=card.resize, max_pixels=card.max_pixels)
        except ImageError as exc:
            return exc

    def check_golden(self) -> float:
        """Answer the golden images again and compare. Return the largest difference of a logit.

        It is relative to the largest golden logit, if that is above 1. An answer may change only where two are as good
        as equal: where its probabilities stay within CLOSE_PROBABILITY. A graph in less than fp32 may be as far off as
        the card says, and its answers may change within that.

        Raises:
            BundleError: it is above the tolerance, so this machine would give other answers than those judged.
        """
        golden_nk = self.bundle.golden_logits()
        logits_nk = self.run_batches(self.decode_golden(self.bundle.golden_images())).logits_nk
        difference = compute_difference(logits_nk, golden_nk)
        found = f"golden answers differ by {difference:.3g}"
        probs = [compute_probs(each_nk, self.card) for each_nk in (logits_nk, golden_nk)]
        same = np.equal(*(self.choose(probs_nk) for probs_nk in probs)).reshape(len(golden_nk), -1).all(axis=1)
        far_n = np.abs(probs[0] - probs[1]).max(axis=1) > CLOSE_PROBABILITY
        changed = int((~same & far_n).sum()) if self.engine.endswith("fp32") else 0
        tolerance = get_tolerance(self.card, self.engine)
        if changed:
            found = f"{found}, and {changed} of {len(golden_nk)} are other ones"
        if changed or not difference <= tolerance:
            raise BundleError(
                f"bundle {self.digest[:12]}",
                found,
                f"at most {tolerance:.3g} of the largest logit, and the same answers",
                "Do not serve it here: check the versions of onnxruntime and Pillow.",
            )
        return difference


def raise_errors(answers: Iterable[Answer | ImageError]) -> list[Answer]:
    """Return the answers. Raises the first ImageError among them."""
    good = []
    for one in answers:
        if isinstance(one, ImageError):
            raise one
        good.append(one)
    return good


def check_card(card: Card, where: str) -> None:
    """Raise BundleError if this version does not know the card's task, or its thresholds do not fit its classes."""
    todo = "Use the version of visionloop that made it, or train again."
    if card.task not in TASKS:
        raise BundleError(where, f"has the task {card.task!r}", f"one of {', '.join(TASKS)}", todo)
    if card.thresholds is not None and set(card.thresholds) != set(card.classes):
        found = f"has thresholds for {shorten([*map(str, card.thresholds)]) or 'nothing'}"
        raise BundleError(where, found, f"one for each of {shorten(card.classes)}", todo)
    if not is_number(card.temperature) or card.temperature <= 0:
        raise BundleError(where, f"has the temperature {card.temperature!r}", "a number above 0", todo)
    if card.biases is not None and (
        set(card.biases) != set(card.classes) or not all(map(is_number, card.biases.values()))
    ):
        found = f"has biases for {shorten([*map(str, card.biases)]) or 'nothing'}"
        raise BundleError(where, found, f"a number for each of {shorten(card.classes)}", todo)
    if card.abstain is not None:
        check_abstain(card.abstain, where, todo)


def choose_batch_size(size_hw: Sequence[int]) -> int:
    """Return how many images go through a network at once: fewer of large images, for the same memory."""
    return max(1, min(BATCH_IMAGES, BATCH_BYTES // max(1, size_hw[0] * size_hw[1] * 3)))


def choose_classes(probs_nk: NDArray[np.floating], card: Card) -> Choices:
    """Return the answer for each image: the likeliest class (n,), for binary by the threshold; or labels (n, k)."""
    if card.task == "multilabel":
        thresholds = card.thresholds or {}
        return probs_nk >= np.array([thresholds.get(name, 0.5) for name in card.classes])
    if card.threshold is not None:
        return (probs_nk[:, 1] >= card.threshold).astype(np.int64)
    return np.asarray(probs_nk.argmax(axis=1), dtype=np.int64)


def compute_confidence(probs_nk: NDArray[np.floating], chosen: Choices) -> NDArray[np.floating]:
    """Return the probability of each answer, (n,). For a set of labels: the product over classes, as if independent."""
    if chosen.ndim == 2:
        return np.asarray(np.where(chosen, probs_nk, 1 - probs_nk).prod(axis=1))
    return probs_nk[np.arange(len(chosen)), chosen]


def _load_reference(bundle: Bundle, where: str) -> FloatArray:
    """Read the embeddings that distances are taken to. Raises BundleError."""
    wanted = int((bundle.card.abstain or {})["neighbours"])
    try:
        with np.load(bundle.folder / "reference.npz", allow_pickle=False) as arrays:
            embedding_nd = arrays["embedding_nd"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise BundleError(where, "reference.npz is damaged", "embeddings", "Train again.") from exc
    if embedding_nd.ndim != 2 or len(embedding_nd) < wanted or not np.isfinite(embedding_nd).all():
        found = f"reference.npz has embeddings of shape {embedding_nd.shape}"
        raise BundleError(where, found, f"{wanted} or more finite ones", "Train again.")
    return pick_reference(embedding_nd)


def name_choices(chosen: Choices, classes: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the names of what was chosen for each image: one, or for multilabel any number."""
    if chosen.ndim == 1:
        return [(classes[int(k)],) for k in chosen]
    return [tuple(classes[int(k)] for k in np.flatnonzero(chosen_k)) for chosen_k in chosen]


class Embedder:
    """The part of a model that maps images to embeddings, on a runtime without torch. `model` holds ONNX."""

    def __init__(self, model: Path, *, runtime: str = "onnxruntime", precision: str = "fp32", threads: int = 0) -> None:
        """Load a model with the output `embedding`; `threads` 0 means all cores. Raises BundleError, ParamsError."""
        self._session = _open(model.read_bytes(), model.name, runtime, precision, threads)

    def embed(self, images_nhwc: UInt8Array) -> FloatArray:
        """Map any number of images (n, h, w, 3) to embeddings (n, d), in slices of limited memory."""
        height, width = images_nhwc.shape[1:3]
        step = max(1, min(MAX_SLICE, SLICE_PIXELS // (height * width)))
        slices = [images_nhwc[i : i + step] for i in range(0, len(images_nhwc), step)]
        parts = [self._session.run(["embedding"], {"images": images})[0] for images in slices]
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def _open(model_bytes: bytes, where: str, runtime: str, precision: str, threads: int) -> Any:
    if runtime == "openvino":
        return _open_openvino(model_bytes, where, precision, threads)
    return open_session(model_bytes, where, threads)


def open_session(model_bytes: bytes, where: str, threads: int) -> Any:
    """Open a checked model in ONNX Runtime. Raises BundleError."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, which writes to the home folder otherwise
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    check_onnx(model_bytes, where)
    try:
        return ort.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # onnxruntime raises classes of its own, from C++
        raise BundleError(where, f"model.onnx does not load ({exc})"[:300]) from exc


def has_openvino() -> bool:
    """Say whether OpenVINO is installed."""
    return find_spec("openvino") is not None


class _OpenVinoSession:
    """A model in OpenVINO, with the one method of ONNX Runtime's session that is used here. Thread-safe by a lock."""

    def __init__(self, request: Any) -> None:
        self._request, self._lock = request, Lock()

    def run(self, names: Sequence[str], inputs: Mapping[str, UInt8Array]) -> list[FloatArray]:
        """Return the outputs of these names."""
        with self._lock:
            self._request.infer(inputs)
            return [np.array(self._request.get_tensor(name).data, np.float32) for name in names]


def _open_openvino(model_bytes: bytes, where: str, precision: str, threads: int) -> _OpenVinoSession:
    """Open a checked model in OpenVINO. Raises BundleError, ParamsError."""
    check_onnx(model_bytes, where)
    try:
        # The import of openvino reports to Google Analytics through this package. Without it, it uses its own stub.
        before = sys.modules.get("openvino_telemetry")
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        try:
            import openvino as ov
        finally:
            if before is None:
                del sys.modules["openvino_telemetry"]
            else:
                sys.modules["openvino_telemetry"] = before
    except ImportError as exc:
        raise ParamsError(
            "params.yaml embed.runtime",
            "got 'openvino', which is not installed",
            "the extra `openvino`",
            f"Run `{describe_install('openvino')}`, or set `runtime: auto`.",
        ) from exc
    options = {"INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision), "INFERENCE_NUM_THREADS": threads}
    try:
        core = ov.Core()
        request = core.compile_model(core.read_model(model_bytes), "CPU", options).create_infer_request()
    except Exception as exc:  # openvino raises RuntimeError and classes of its own, from C++
        raise BundleError(where, f"does not load in OpenVINO ({exc})"[:300]) from exc
    return _OpenVinoSession(request)
