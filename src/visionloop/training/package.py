"""From the best weights to a bundle: export, parity with torch, golden answers, reference embeddings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from visionloop.bundle import Bundle, hash_file, seal_bundle
from visionloop.data.manifest import make_image_key
from visionloop.data.shards import Prepared
from visionloop.errors import TrainingError
from visionloop.networks.classifier import Classifier
from visionloop.networks.export import compute_torch_logits, export_onnx
from visionloop.params import Params
from visionloop.predictor import Predictor
from visionloop.records import Card, canonical_json
from visionloop.store import ObjectStore

NUM_GOLDEN = 8
NUM_PARITY = 32
PARITY_TOLERANCE = 1e-3
SUFFIXES = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp"}


def write_bundle(
    folder: Path, classifier: Classifier, params: Params, prepared: Prepared, store: ObjectStore, *, way: dict[str, str]
) -> str:
    """Write a whole bundle into an empty folder and return its digest. `way`: how it was computed (precision, threads).

    The golden answers and the reference embeddings are given by the exported model, not by torch.

    Raises:
        TrainingError: torch and ONNX do not agree.
    """
    (folder / "golden").mkdir(parents=True)
    classifier = classifier.cpu().float().eval()
    export_onnx(classifier, prepared.size_hw, folder / "model.onnx")
    state = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    (folder / "weights.safetensors").write_bytes(save(state))
    card = _make_card(params, prepared, way)
    predictor = Predictor(Bundle(folder=folder, digest="unsealed", card=card, files={}))
    card = replace(card, parity=_check_parity(classifier, predictor, prepared))
    (folder / "card.json").write_bytes(json.dumps(card.to_json(), indent=2, sort_keys=True).encode() + b"\n")
    _write_reference(folder / "reference.npz", predictor, prepared)
    _write_golden(folder / "golden", predictor, prepared, store)
    digest = seal_bundle(folder)
    Predictor.load(folder)
    return digest


def hash_weights_file(home: Path, weights: str) -> str:
    """Return the digest of a weights file, so that another file under the same name is another input."""
    path = (home / Path(weights).expanduser()).resolve()
    return hash_file(path) if weights not in {"none", "default"} and path.is_file() else ""


def _check_parity(classifier: Classifier, predictor: Predictor, prepared: Prepared) -> float:
    """Return the largest difference between torch and ONNX, relative to the largest logit (at least 1)."""
    images_nhwc = prepared.read(prepared.rows("val")[:NUM_PARITY])
    ours = predictor.run(images_nhwc).logits_nk
    theirs = compute_torch_logits(classifier, torch.from_numpy(images_nhwc)).numpy()
    parity = float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))
    if not parity <= PARITY_TOLERANCE:
        raise TrainingError("export", f"torch and ONNX differ by {parity:.3g}", f"at most {PARITY_TOLERANCE}")
    return float(f"{parity:.1e}")


def _write_reference(path: Path, predictor: Predictor, prepared: Prepared) -> None:
    """Write the embeddings of the validation side: what this model's inputs look like when all is well."""
    rows = prepared.rows("val")
    parts = np.array_split(rows, max(1, -(-len(rows) // 64)))
    np.savez(
        path,
        embedding_nd=np.concatenate([predictor.run(prepared.read(part)).embedding_nd for part in parts]),
        label_n=prepared.label_n[rows],
        sha256_n=np.asarray([prepared.sha256_n[row] for row in rows], dtype="S64"),
    )


def _write_golden(folder: Path, predictor: Predictor, prepared: Prepared, store: ObjectStore) -> None:
    """Keep a few validation images of all classes as they were ingested, and this model's answers to them."""
    rows = prepared.rows("val")
    order = np.argsort(prepared.label_n[rows], kind="stable")
    picks = np.linspace(0, len(rows) - 1, min(NUM_GOLDEN, len(rows))).round().astype(int)
    chosen = rows[order][picks]
    images = [store.get(make_image_key(prepared.sha256_n[row])) for row in chosen]
    names = [f"{number:02d}.{SUFFIXES.get(data[:2], 'bin')}" for number, data in enumerate(images)]
    for name, data in zip(names, images, strict=True):
        (folder / name).write_bytes(data)
    outputs = predictor.run_batches(np.stack([predictor.decode(data, "golden image") for data in images]))
    logits = [[round(float(z), 6) for z in row] for row in outputs.logits_nk]
    labels = [prepared.classes[prepared.label_n[row]] for row in chosen]
    (folder / "answers.json").write_bytes(canonical_json({"images": names, "labels": labels, "logits": logits}))


def _make_card(params: Params, prepared: Prepared, way: dict[str, str]) -> Card:
    pin = prepared.pin
    return Card(
        name=params.name,
        task="binary" if len(prepared.classes) == 2 else "multiclass",
        classes=prepared.classes,
        image_size=prepared.size_hw,
        resize=prepared.resize,
        temperature=1.0,
        threshold=0.5 if len(prepared.classes) == 2 else None,
        runtimes=("onnxruntime",),
        dataset={"name": pin.name, "version": pin.version, "digest": pin.digest},
        params={"train": params.train.model_dump(mode="json"), "prepare": params.prepare.model_dump(mode="json")},
        network={"backbone": params.train.backbone, **way},
        parity=0.0,
    )
