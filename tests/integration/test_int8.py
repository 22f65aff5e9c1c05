"""The second graph: what train writes and approves, and how it goes through judging, the ledger and the server."""

import errno
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders import make_encoder
from homes import Home, Notes, fork
from visionloop.bundle import INT8_MODEL, Bundle, check_onnx, load_bundle
from visionloop.data.rows import HeldRows, hold_records
from visionloop.engines import open_fastest
from visionloop.errors import BundleError, TrainingError
from visionloop.evaluation.evaluate import evaluate
from visionloop.evaluation.runtimes import load_approved
from visionloop.networks import processor
from visionloop.networks.processor import sums_int8_exactly
from visionloop.predictor import FP32, INT8, Predictor
from visionloop.records import Card
from visionloop.training import engines
from visionloop.training.engines import approve_engines, find_unseen

EXPORT = {"int8": "on", "most_changed": 0.1}


@pytest.fixture(autouse=True)
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.evaluation.runtimes.has_openvino", lambda: False)


def approve(home: Home, folder: Path, kept_in: Path | None = None, **export: Any) -> tuple[Card, Notes, Path]:
    """Let a finished bundle be tried again as its training does it; return its card, what was told, its folder."""
    home.section["export"] = {**EXPORT, **export}
    home.notes = Notes()
    shutil.copytree(home.settings.candidate_dir, folder)
    (folder / INT8_MODEL).unlink(missing_ok=True)
    card = replace(load_bundle(home.settings.candidate_dir).card, runtimes=(FP32,), engines=None)
    kept_in = kept_in or folder.with_name(f"{folder.name}-kept")
    card = approve_engines(home.make_quiet_job(), Bundle(folder, "unsealed", card, {}), kept_in)
    return card, home.notes, folder


def test_a_training_writes_it_and_all_that_follows_knows_it(
    champion: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fork(champion, tmp_path / "ws", max_epochs=6, export=EXPORT)
    digest = home.train()
    bundle = load_bundle(home.settings.candidate_dir, expected_digest=digest)
    assert INT8_MODEL in bundle.files
    assert bundle.card.runtimes == (FP32, INT8)
    found = bundle.card.engines[INT8]
    unseen = len(find_unseen(home.make_quiet_job()))
    assert (found["approved"], found["images"]) == (True, unseen)
    assert found["most_changed"] <= 0.1 and found["cosine"] > 0.9 and found["tolerance"] >= 0.02
    assert found["exact"] is sums_int8_exactly(), "for servers on other processors"
    assert any(line.startswith(f"{INT8}: approved: ") for line in home.notes.lines)
    check_onnx((bundle.folder / INT8_MODEL).read_bytes(), "int8")
    fast, slow = (Predictor(bundle, threads=1, engine=name) for name in (INT8, FP32))
    assert 0 < fast.check_golden() <= found["tolerance"]
    images = slow.decode_golden(bundle.golden_images())
    assert not np.array_equal(fast.run(images).logits_nk, slow.run(images).logits_nk), "it is another graph"

    evaluate(home)
    assert load_approved(home.settings.reports_dir, digest) == (INT8,)
    (row,) = json.loads((home.settings.reports_dir / "intervals.json").read_text())["runtimes"]
    assert row["log_loss_rise"] <= 0.01
    assert "<td>onnxruntime int8</td>" in (home.settings.reports_dir / "report.html").read_text()

    opened = open_fastest(bundle, [INT8], hidden_dir=tmp_path / "hidden", threads=1)
    kept = json.loads((tmp_path / "hidden" / "machine.json").read_text())["measured"][0]["images_per_s"]
    assert list(kept) == [FP32, INT8] and min(kept.values()) > 0
    assert opened.predictor.engine == (INT8 if kept[INT8] >= 1.1 * kept[FP32] else FP32)

    home.section["export"] = {**EXPORT, "most_changed": 0.2}
    with monkeypatch.context() as patch:
        patch.setattr(engines, "quantise", None)
        home.train()
    again = load_bundle(home.settings.candidate_dir)
    assert any("only train.export changed" in line for line in home.notes.lines)
    assert (again.files[INT8_MODEL], again.card.engines[INT8]["approved"]) == (bundle.files[INT8_MODEL], True)
    home.section["export"] = {"int8": "off"}
    home.train()
    assert INT8_MODEL not in load_bundle(home.settings.candidate_dir).files
    home.section["export"] = EXPORT
    assert home.train() == digest, "none of the others has touched the first"

    (bundle.folder / INT8_MODEL).write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model\.int8\.onnx differs from its digest"):
        load_bundle(bundle.folder)


def test_the_same_images_give_the_same_bytes(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws")
    cards, _, folders = zip(*(approve(home, tmp_path / name) for name in ("a", "b")), strict=True)
    assert cards[0] == cards[1]
    assert (folders[0] / INT8_MODEL).read_bytes() == (folders[1] / INT8_MODEL).read_bytes()


def test_the_graph_is_made_once_unless_it_was_damaged_or_would_be_another_one(
    champion: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, kept_in = fork(champion, tmp_path / "ws"), tmp_path / "kept"
    card, _, folder = approve(home, tmp_path / "first", kept_in)
    with monkeypatch.context() as patch:
        patch.setattr(engines, "quantise", None)
        again, notes, taken = approve(home, tmp_path / "again", kept_in)
    graph = (folder / INT8_MODEL).read_bytes()
    assert (again, (taken / INT8_MODEL).read_bytes(), len(notes.lines)) == (card, graph, 1)
    (kept_in / INT8_MODEL).unlink()  # it is a second name of the file in the bundle
    (kept_in / INT8_MODEL).write_bytes(graph[:-1] + b"?")
    known = processor.describe_machine("onnxruntime", "onnx")
    for name, about in {"damaged": known, "other": {**known, "onnx": "0.1"}}.items():
        monkeypatch.setattr(engines, "describe_machine", lambda *names, about=about: about)
        made, notes, folder = approve(home, tmp_path / name, kept_in)
        assert notes.lines[0].startswith("int8: makes a second graph, and compares")
        assert (made, (folder / INT8_MODEL).read_bytes()) == (card, graph)

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engines, "link_file", refuse)
    made, notes, folder = approve(home, tmp_path / "full", tmp_path / "none")
    assert (made, (folder / INT8_MODEL).read_bytes()) == (card, graph)
    assert notes.lines[1] == "int8: its graph cannot be kept (No space left on device): the next threshold takes longer"


def test_it_is_not_tried_where_it_is_off_small_or_cannot_be_shown(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws")
    for name, export in {"off": {"int8": "off"}, "small": {"int8": "auto"}}.items():
        card, notes, folder = approve(home, tmp_path / name, **export)
        assert (card.runtimes, card.engines, notes.lines) == ((FP32,), None, [])
        assert not (folder / INT8_MODEL).exists()
    card, notes, folder = approve(home, tmp_path / "few", most_changed=0.01)
    unseen = len(find_unseen(home.make_quiet_job()))
    (line,) = notes.lines
    assert line.startswith(f"int8: not tried: there are {unseen} images (one of a group)")
    assert line.endswith(f"{299 - unseen} more are needed")
    assert card.engines is None and not (folder / INT8_MODEL).exists()


def test_images_that_it_has_learned_from_and_frames_of_one_film_do_not_count(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws")
    job = home.make_quiet_job()
    rows_n = find_unseen(job)
    assert set(job.prepared.side_n[rows_n]) == {"val", "test"}
    home.section |= {"on": "all", "monitor": "train/loss"}
    assert set(job.prepared.side_n[find_unseen(home.make_quiet_job())]) == {"test"}
    manifest = home.settings.prepared_dir / "manifest.parquet"
    records = list(HeldRows(io.BytesIO(manifest.read_bytes())))
    manifest.write_bytes(
        hold_records(replace(r, group="film", key="film") if r.side == "test" else r for r in records).file.getvalue()
    )
    assert len(find_unseen(home.make_quiet_job())) == 1


def test_a_graph_that_answers_otherwise_is_told_and_not_kept(
    champion: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = fork(champion, tmp_path / "ws")
    quantise = engines.quantise

    def quantise_badly(model: Path, target: Path, batches: Any) -> None:
        quantise(model, target, (np.full_like(batch, 127) for batch in batches))

    monkeypatch.setattr(engines, "quantise", quantise_badly)
    card, notes, folder = approve(home, tmp_path / "bad")
    assert card.runtimes == (FP32,)
    assert card.engines[INT8]["approved"] is False and card.engines[INT8]["changed"] > 5
    assert notes.lines[-1].startswith(f"{INT8}: LOOK: not approved: {card.engines[INT8]['changed']} of ")
    assert not (folder / INT8_MODEL).exists()

    monkeypatch.setattr(engines, "quantise", quantise)
    monkeypatch.setattr(engines, "compute_difference", lambda ours, golden: 0.3)
    card, notes, folder = approve(home, tmp_path / "far", int8="on", most_changed=0.9)
    assert (card.runtimes, card.engines[INT8]["approved"]) == ((FP32,), False)
    assert notes.lines[-1] == (
        f"{INT8}: LOOK: not approved: the logits of the golden images are off by 0.3 of the largest; expected at most "
        "0.25"
    )
    monkeypatch.setattr(engines, "SMALL_PIXELS", 1)
    _, notes, _ = approve(home, tmp_path / "unasked", int8="auto", most_changed=0.9)
    assert notes.lines[-1].startswith(f"{INT8}: not approved: "), "nobody asked for it: no alarm"

    def refuse(model: Path, target: Path, batches: Any) -> None:
        raise TrainingError("train.export.int8", "the graph cannot be made int8 (ValueError: odd)")

    monkeypatch.setattr(engines, "quantise", refuse)
    card, notes, folder = approve(home, tmp_path / "odd")
    assert card.engines == {INT8: {"approved": False, "why": "the graph cannot be made int8 (ValueError: odd)"}}
    assert notes.lines[-1] == "int8: the graph cannot be made int8 (ValueError: odd); there is none"


@pytest.mark.parametrize("way", ["frozen", "knn"])
def test_heads_on_embeddings_stay_as_they_are(champion: Home, tmp_path: Path, way: str) -> None:
    """The graph that `embed` exported is joined to the head, and both are quantised as one."""
    home = fork(champion, tmp_path / "ws", way=way, weights="weights.safetensors", export=EXPORT)
    home.embed()
    home.train()
    bundle = load_bundle(home.settings.candidate_dir)
    assert bundle.card.engines[INT8]["images"] > 29
    assert (INT8 in bundle.card.runtimes) is bundle.card.engines[INT8]["approved"] is (INT8_MODEL in bundle.files)
    if way == "frozen":
        assert bundle.card.engines[INT8]["approved"]


@pytest.mark.parametrize("options", [{}, {"layout": "NHWC"}, {"opset": 13}], ids=["nchw", "nhwc", "old"])
def test_an_onnx_encoder_of_ones_own(champion: Home, tmp_path: Path, options: dict[str, Any]) -> None:
    import onnx

    home = fork(champion, tmp_path / "ws", way="frozen", backbone="encoder.onnx", preprocessing="none", export=EXPORT)
    onnx.save(make_encoder(**options), home.folder / "encoder.onnx")
    home.embed()
    home.train()
    bundle = load_bundle(home.settings.candidate_dir)
    assert INT8 in bundle.card.engines
    assert (INT8_MODEL in bundle.files) is bundle.card.engines[INT8]["approved"]
