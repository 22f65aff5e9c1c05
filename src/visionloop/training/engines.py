"""Which engines may serve a bundle beside ONNX Runtime in fp32, and its second graph, in int8.

Both are tried before the bundle is sealed. No label is looked at, so images of the test side count.
`evaluation.runtimes` says how, and what it shows.

What costs time does not depend on thresholds: the graph in int8, and what engines give for images. It is kept beside
the network (`KeptOutputs`; here model.int8.onnx and graph.json, what it was made of). Which answers differ, and so
which engine may serve, is counted anew from it for each card.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from visionloop.bundle import INT8_MODEL, MODEL, Bundle, hash_file
from visionloop.confidence import GOLDEN_TOLERANCE, MOST_TOLERANCE, compute_difference
from visionloop.data.images import UInt8Array
from visionloop.data.shards import IntArray
from visionloop.errors import TrainingError
from visionloop.evaluation.promises import count_flawless, keep_one_of_a_key
from visionloop.evaluation.runtimes import (
    DELTA,
    KeptOutputs,
    RuntimeCheck,
    describe_bound,
    describe_few,
    list_engines,
    try_engine,
)
from visionloop.networks.export import quantise
from visionloop.networks.processor import describe_machine, sums_int8_exactly
from visionloop.predictor import ENGINES, FP32, INT8, Predictor, choose_batch_size
from visionloop.records import Card, canonical_json
from visionloop.training.job import Job
from visionloop.workfolder import link_file, write_file

SMALL_PIXELS = 64 * 64
NUM_CALIBRATION, CALIBRATION_BATCH = 200, 16
# Times as many images as would do if none were answered otherwise: two may be. For at most 1 % that is 628 images, and
# an engine that changes one answer in 600 passes nine times in ten.
ROOM = 2.1
# Another processor or runtime rounds otherwise: its golden logits may be so much farther off than here.
MARGIN = 2.0


def approve_engines(job: Job, bundle: Bundle, kept_in: Path) -> Card:
    """Write the graph in int8 into a bundle that lacks only its card, and return the card with what may serve it.

    One that is there is that of this network. A graph that no engine may serve is not kept. Why there is none is told.
    `kept_in`: the folder beside the network of what was computed for another card.
    """
    section, card, tell, graph = job.params.train.export, bundle.card, job.watcher.tell, bundle.folder / INT8_MODEL
    height, width = card.image_size
    if section.int8 == "off" or (section.int8 == "auto" and height * width < SMALL_PIXELS):
        graph.unlink(missing_ok=True)
        return card
    rows_n = find_unseen(job)
    if few := describe_few(len(rows_n), section.most_changed):
        tell(f"int8: not tried: there are {few}")
        graph.unlink(missing_ok=True)
        return card
    engines: dict[str, Any] = {}
    try:
        _place_graph(job, bundle.folder, kept_in)
    except TrainingError as exc:
        tell(f"int8: {exc.found}; {'expected ' + exc.expected if exc.expected else 'there is none'}")
        engines[INT8] = {"approved": False, "why": exc.found}
    kept = KeptOutputs(kept_in, tell)
    step = choose_batch_size(job.prepared.size_hw)
    with kept.saving():
        reference = Predictor(bundle, keep=kept.open)
        outputs = [reference.run(job.prepared.read(rows_n[i : i + step])) for i in range(0, len(rows_n), step)]
    for name in list_engines(with_int8=INT8 not in engines):
        with kept.saving():
            check = try_engine(
                name, reference, job.prepared, rows_n, outputs, most=section.most_changed, keep=kept.open
            )
            engines[name] = found = _judge(check, section.most_changed)
        verdict = "approved" if found["approved"] else f"{'LOOK: ' * (section.int8 == 'on')}not approved"
        tell(f"{name}: {verdict}: {found.get('why') or describe_bound(check, section.most_changed)}")
    approved = tuple(n for n in ENGINES if n == FP32 or engines.get(n, {}).get("approved"))
    if not any(name.endswith("int8") for name in approved):
        graph.unlink(missing_ok=True)
    return replace(card, runtimes=approved, engines=engines)


def _place_graph(job: Job, folder: Path, kept_in: Path) -> None:
    """Put the graph in int8 into a bundle's folder: the one that is kept, else the one there, else one that is made.

    One that is there counts where nothing is kept: it came with the champion. Raises TrainingError, OSError.
    """
    graph, kept, facts = folder / INT8_MODEL, kept_in / INT8_MODEL, kept_in / "graph.json"
    about = {"of": hash_file(folder / MODEL), **describe_machine("onnxruntime", "onnx")}
    if facts.exists():
        graph.unlink(missing_ok=True)
        if _is_graph(kept, facts, about):
            link_file(kept, graph)
            return
    if graph.exists():
        job.watcher.tell("engines: compares their answers with those of the first graph ...")
    else:
        job.watcher.tell("int8: makes a second graph, and compares its answers with those of the first ...")
        quantise(folder / MODEL, graph, _read_calibration(job))
    try:
        kept_in.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)
        link_file(graph, kept)
        write_file(facts, canonical_json({"about": about, "sha256": hash_file(kept)}))
    except OSError as exc:
        job.watcher.tell(f"int8: its graph cannot be kept ({exc.strerror}): the next threshold takes longer")


def _is_graph(kept: Path, facts: Path, about: dict[str, Any]) -> bool:
    """Say whether the graph that is kept is whole, and what would be made of this network here."""
    try:
        return bool(json.loads(facts.read_bytes()) == {"about": about, "sha256": hash_file(kept)})
    except (OSError, ValueError):
        return False


def find_unseen(job: Job) -> IntArray:
    """Return the rows of images that the network has not learned from, one of each group, as many as are compared."""
    rows_n = np.setdiff1d(np.arange(len(job.prepared.sha256_n)), job.train_rows)
    if not len(rows_n):
        return rows_n
    rows_n = rows_n[keep_one_of_a_key(np.unique(job.prepared.load_keys(rows_n), return_inverse=True)[1])]
    return _pick(rows_n, count_compared(job.params.train.export.most_changed))


def count_compared(most_changed: float) -> int:
    """Return the number of images that are compared at most, to show that so few answers differ."""
    return math.ceil(ROOM * count_flawless(most_changed, DELTA))


def _read_calibration(job: Job) -> Iterator[UInt8Array]:
    rows_n = _pick(job.train_rows, NUM_CALIBRATION)
    for start in range(0, len(rows_n), CALIBRATION_BATCH):
        yield job.prepared.read(rows_n[start : start + CALIBRATION_BATCH])


def _pick(rows_n: IntArray, most: int) -> IntArray:
    """Return so many rows at most, evenly spaced: in the order of sha256 these are random ones."""
    return rows_n[np.linspace(0, len(rows_n) - 1, min(most, len(rows_n))).round().astype(np.int64)]


def _judge(check: RuntimeCheck, most_changed: float) -> dict[str, Any]:
    """Return what the card says of an engine, in figures that do not hang on the last bits."""
    if check.predictor is None:
        return {"approved": False, "why": "it does not load the model"}
    golden_nk, images = check.predictor.bundle.golden_logits(), check.predictor.bundle.golden_images()
    off = compute_difference(check.predictor.run_batches(check.predictor.decode_golden(images)).logits_nk, golden_nk)
    is_alike, is_near = check.most_changed <= most_changed, MARGIN * off <= MOST_TOLERANCE
    line = f"{MOST_TOLERANCE / MARGIN:g}"
    far = f"the logits of the golden images are off by {off:.2g} of the largest; expected at most {line}"
    return {
        "approved": check.is_approved and is_alike and is_near,
        "images": check.num_images,
        "changed": check.num_changed,
        "most_changed": round(check.most_changed, 4),
        "cosine": round(check.cosine, 3),
        "tolerance": float(f"{max(GOLDEN_TOLERANCE, MARGIN * off):.2g}") if np.isfinite(off) else None,
        **({"exact": sums_int8_exactly()} if check.name.endswith("int8") else {}),
        **({"why": far} if is_alike and not is_near else {}),
    }
