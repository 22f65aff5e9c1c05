"""From the best weights to a bundle: export, parity with torch, confidence, golden answers, reference embeddings."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from visionloop.bundle import DIGESTS, Bundle, seal_bundle
from visionloop.data.images import UInt8Array, decode_image
from visionloop.data.manifest import make_image_key
from visionloop.data.shards import IntArray, Prepared
from visionloop.errors import TrainingError
from visionloop.evaluation.thresholds import PLAIN
from visionloop.evaluation.tuning import Validation, tune_card
from visionloop.features.encoder import load_graph
from visionloop.features.view import load_facts
from visionloop.networks.classifier import Classifier, NeighbourHead, find_steady
from visionloop.networks.export import EmbeddingNetwork, compute_torch_logits, export_onnx
from visionloop.networks.weights import describe_network
from visionloop.params import WAYS_ON_EMBEDDINGS, Params
from visionloop.predictor import FP32, FloatArray, Outputs, Predictor, choose_batch_size, join_outputs
from visionloop.records import Card, canonical_json
from visionloop.training.engines import approve_engines
from visionloop.training.imbalance import plan_imbalance
from visionloop.training.job import Job
from visionloop.workfolder import link_folder

NUM_GOLDEN = 8
NUM_PARITY = 32
PARITY_TOLERANCE = 1e-3
SUFFIXES = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp"}


def write_bundle(folder: Path, classifier: nn.Module, job: Job, kept_in: Path, *, way: dict[str, str]) -> str:
    """Write a whole bundle into an empty folder and return its digest. `way`: how it was computed (precision, threads).

    `kept_in`: where what engines give is kept for another card, and for a training that is stopped in their checks.
    The classifier maps uint8 images (n, h, w, 3), or behind an ONNX encoder embeddings, to units and embeddings. The
    golden answers and the reference embeddings are given by the exported model, not by torch.

    Raises:
        TrainingError: torch and ONNX do not agree.
    """
    params, prepared = job.params, job.prepared
    rows = prepared.rows(job.validated_on)
    (folder / "golden").mkdir(parents=True)
    classifier = classifier.cpu().float().eval()
    export_onnx(classifier, prepared.size_hw, folder / "model.onnx", encoder=_find_encoder(classifier, job))
    state = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    (folder / "weights.safetensors").write_bytes(save(state))
    network = describe_network(params.train, classifier) | way
    card = _make_card(params, prepared, network if job.start is None else {**network, "started_from": job.start})
    predictor = Predictor(Bundle(folder=folder, digest="unsealed", card=card, files={}))
    outputs = _write_reference(folder / "reference.npz", predictor, prepared, rows)
    steady = _find_steady(classifier, outputs.embedding_nd, rows)
    card = replace(card, parity=_check_parity(classifier, predictor, prepared.read(steady[:NUM_PARITY])))
    _write_golden(folder / "golden", predictor, job, steady)
    return _finish(folder, _tune(card, job, outputs.logits_nk, outputs.embedding_nd, rows), job, kept_in)


def write_bundle_again(folder: Path, made: Bundle, job: Job, kept_in: Path) -> str:
    """Write the bundle of a network that is packed already, with what only the card says made anew; return its digest.

    It is bit for bit what `write_bundle` would make: all that is not of the card does not depend on `job.ending`.
    """
    link_folder(made.folder, folder)
    for name in ("card.json", DIGESTS):
        (folder / name).unlink()
    card = replace(_make_card(job.params, job.prepared, made.card.network), parity=made.card.parity)
    with np.load(folder / "reference.npz") as known:
        logits_nk, embedding_nd = known["logits_nk"], known["embedding_nd"]
    card = _tune(card, job, logits_nk, embedding_nd, job.prepared.rows(job.validated_on))
    return _finish(folder, card, job, kept_in)


def _finish(folder: Path, card: Card, job: Job, kept_in: Path) -> str:
    """Write the card into a folder that has all the rest, and seal it."""
    card = approve_engines(job, Bundle(folder=folder, digest="unsealed", card=card, files={}), kept_in)
    (folder / "card.json").write_bytes(json.dumps(card.to_json(), indent=2, sort_keys=True).encode() + b"\n")
    digest = seal_bundle(folder)
    Predictor.load(folder)
    return digest


def _find_encoder(classifier: nn.Module, job: Job) -> Any:
    """Return the graph of the network before the head where `embed` has run it: exporting takes seconds. Else None."""
    if job.params.train.way not in WAYS_ON_EMBEDDINGS or not isinstance(classifier, Classifier):
        return None
    facts = load_facts(job.settings.features_dir)
    network = EmbeddingNetwork(classifier.backbone, classifier.num_features, job.prepared.size_hw)
    return load_graph(job.settings.hidden_dir, facts, network)


def _check_parity(classifier: nn.Module, predictor: Predictor, images_nhwc: UInt8Array) -> float:
    """Return the largest difference between torch and ONNX, relative to the largest logit (at least 1)."""
    outputs = predictor.run_batches(images_nhwc)
    ours, size = outputs.logits_nk, choose_batch_size(images_nhwc.shape[1:3])
    batches = [slice(i, i + size) for i in range(0, len(images_nhwc), size)]
    theirs = np.concatenate(
        [compute_torch_logits(classifier, images_nhwc[batch], outputs.embedding_nd[batch]) for batch in batches]
    )
    parity = float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))
    if not parity <= PARITY_TOLERANCE:
        raise TrainingError("export", f"torch and ONNX differ by {parity:.3g}", f"at most {PARITY_TOLERANCE}")
    return float(f"{parity:.1e}")


def _find_steady(classifier: nn.Module, embedding_nd: FloatArray, rows: IntArray) -> IntArray:
    """Return the rows whose answers stay the same where the last bits of an embedding differ, as on other processors.

    The answers of a linear head change as little as the embeddings do. Where neighbours vote, the last bit can decide
    which of two images is the nearer one: such an image shows nothing about the export or the machine.
    """
    head = getattr(classifier, "head", None)
    if not isinstance(head, NeighbourHead):
        return rows
    steady = find_steady(head, torch.from_numpy(embedding_nd)).numpy()
    return rows[steady] if steady.any() else rows


def _write_reference(path: Path, predictor: Predictor, prepared: Prepared, rows: IntArray) -> Outputs:
    """Write what this model gives for the validation side: embeddings and logits, and the truth; return the outputs.

    The embeddings say what its inputs look like when all is well; the curves of a report are drawn from the logits.
    """
    parts = np.array_split(rows, max(1, -(-len(rows) // choose_batch_size(prepared.size_hw))))
    found = [predictor.run(prepared.read(part)) for part in parts]
    outputs = join_outputs(found)
    several: dict[str, Any] = {} if prepared.targets_nk is None else {"targets_nk": prepared.targets_nk[rows]}
    np.savez(
        path,
        embedding_nd=outputs.embedding_nd,
        logits_nk=outputs.logits_nk,
        label_n=prepared.label_n[rows],
        sha256_n=np.asarray([prepared.sha256_n[row] for row in rows], dtype="S64"),
        **several,
    )
    return outputs


def _tune(card: Card, job: Job, logits_nk: FloatArray, embedding_nd: FloatArray, rows: IntArray) -> Card:
    """Return the card with what can be tuned on the validation side: confidence, thresholds, when to abstain."""
    section, prepared = job.params.train, job.prepared
    if why := describe_untuned(section.on, job.validated_on):
        asked = ["train.threshold"] * (section.threshold.at is None) + ["train.abstain"] * (section.abstain is not None)
        without = f"; LOOK: {' and '.join(asked)} cannot be followed" if asked else ""
        job.watcher.tell(f"confidence: nothing is tuned: {why}{without}")
        return replace(card, tuning={"on": None, "why": why})
    key_n = np.unique(prepared.load_keys(rows), return_inverse=True)[1].astype(np.int64)
    truth: Any = prepared.label_n[rows] if prepared.targets_nk is None else prepared.targets_nk[rows].astype(bool)
    validation = Validation(logits_nk, embedding_nd, truth, key_n)
    # Neighbours vote without weights, whatever is said about imbalance.
    with_biases = section.way != "knn" and plan_imbalance(job).kind != "none"
    card, lines = tune_card(card, validation, section.threshold, section.abstain, with_biases=with_biases)
    for line in lines:
        job.watcher.tell(line)
    return card


def describe_untuned(on: str, validated_on: str) -> str:
    """Say why a training has no images to tune confidence on; nothing where it has."""
    if on == "all":
        return "with `train.on: all` the model has learned from the validation images too"
    if validated_on != "val":
        return f"a random split has no validation side, and the {validated_on} side must stay unseen"
    return ""


def _write_golden(folder: Path, predictor: Predictor, job: Job, rows: IntArray) -> None:
    """Keep a few validation images of all classes, and this model's answers to them."""
    prepared = job.prepared
    order = np.argsort(prepared.label_n[rows], kind="stable")
    picks = np.linspace(0, len(rows) - 1, min(NUM_GOLDEN, len(rows))).round().astype(int)
    chosen = rows[order][picks]
    images = [_make_golden(job.store.get(make_image_key(prepared.sha256_n[row]))) for row in chosen]
    names = [f"{number:02d}.{SUFFIXES[data[:2]]}" for number, data in enumerate(images)]
    for name, data in zip(names, images, strict=True):
        (folder / name).write_bytes(data)
    outputs = predictor.run_batches(predictor.decode_golden(images))
    logits = [[round(float(z), 6) for z in row] for row in outputs.logits_nk]
    several = prepared.task == "multilabel"
    labels = [list(prepared.labels(row)) if several else prepared.labels(row)[0] for row in chosen]
    (folder / "answers.json").write_bytes(canonical_json({"images": names, "labels": labels, "logits": logits}))


def _make_golden(data: bytes) -> bytes:
    """Return an image as it is, or as PNG where not every machine that serves can read its format (AVIF, HEIC)."""
    if data[:2] in SUFFIXES:
        return data
    sink = io.BytesIO()
    decode_image(data, "golden image", max_pixels=None).save(sink, "PNG")
    return sink.getvalue()


def _make_card(params: Params, prepared: Prepared, network: dict[str, Any]) -> Card:
    pin, threshold = prepared.pin, params.train.threshold.at or PLAIN
    return Card(
        name=params.name,
        task=prepared.task,
        classes=prepared.classes,
        image_size=prepared.size_hw,
        resize=prepared.resize,
        temperature=1.0,
        threshold=threshold if prepared.task == "binary" else None,
        runtimes=(FP32,),
        dataset={"name": pin.name, "version": pin.version, "digest": pin.digest},
        params={"train": params.train.model_dump(mode="json"), "prepare": params.prepare.model_dump(mode="json")},
        network={"backbone": params.train.network_name, **network},
        parity=0.0,
        thresholds=dict.fromkeys(prepared.classes, threshold) if prepared.task == "multilabel" else None,
        max_pixels=params.ingest.max_pixels,
    )
