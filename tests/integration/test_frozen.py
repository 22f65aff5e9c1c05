"""The way `frozen`: a head on embeddings, solved or learned by epochs, and what it is compared with."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from homes import QUIET_RUN, Home, Notes, fork
from processors import RELATIVE, measure_distance
from visionloop.data.shards import load_prepared
from visionloop.errors import DatasetError, ParamsError
from visionloop.features import encoder as encoders
from visionloop.features.view import load_features
from visionloop.networks import export as exports
from visionloop.networks.classifier import Classifier
from visionloop.predictor import Predictor
from visionloop.training.datamodule import PreparedData
from visionloop.training.job import Job
from visionloop.training.ways import WAYS, prepare_learning


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_learns_the_head_that_passes_through_the_backbone_would_give(
    champion: Home, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 both the embeddings and the head are computed in it; what is served is fp32."""
    options = {"way": "frozen", "weights": "weights.safetensors", "schedule": "constant", "weight_decay": 0.0}
    home = fork(champion, tmp_path / "ws", max_epochs=4, learning_rate=3e-2, precision=precision, **options)
    if precision == "bf16":
        monkeypatch.setattr(encoders, "list_candidates", lambda wanted, accelerator, has_torch: ["torch bf16"])
    home.embed()
    module, _ = prepare_learning(home.make_quiet_job(), QUIET_RUN)
    assert not [name for name in module.state_dict() if "backbone" in name], "checkpoints hold the head alone"
    home.train()
    predictor = Predictor.load(home.settings.candidate_dir)
    prepared = load_prepared(home.settings.prepared_dir)
    rows = prepared.rows("val")

    embedding_nd, facts = load_features(home.settings.features_dir, prepared)
    outputs = predictor.run_batches(prepared.read(rows))
    assert facts.precision == precision
    assert measure_distance(outputs.embedding_nd, embedding_nd[rows]) <= RELATIVE[precision]

    from visionloop.networks.weights import read_weights

    state = read_weights(home.settings.candidate_dir / "weights.safetensors")
    old = read_weights(home.folder / "weights.safetensors")
    assert all(torch.equal(state[name], old[name]) for name in old if name.startswith("backbone."))
    logits = functional.linear(torch.from_numpy(embedding_nd[rows]), state["head.weight"], state["head.bias"])
    assert measure_distance(outputs.logits_nk, logits.numpy()) <= RELATIVE[precision]

    best = max(home.notes.epochs, key=lambda report: (-report.metrics["val/loss"], report.epoch))
    plain = train_plainly(home.make_job(), module.classifier, best.epoch)
    # The rounding of each step adds up over the epochs.
    head, plain_head = state["head.weight"].numpy(), plain.head.weight.detach().numpy()
    assert measure_distance(head, plain_head) <= {"fp32": 2e-3, "bf16": 2 * RELATIVE["bf16"]}[precision]
    with torch.no_grad():
        theirs = plain(torch.from_numpy(prepared.read(rows)))[0].numpy()
    assert (theirs.argmax(1) == outputs.logits_nk.argmax(1)).mean() > 0.997
    assert [report.epoch for report in home.notes.epochs] == [1, 2, 3, 4]
    assert best.metrics["val/accuracy"] > 0.9


def train_plainly(job: Job, head_alone: Classifier, epochs: int) -> Classifier:
    """Train the same head by hand: images through the backbone at every step, as anyone would."""
    from visionloop.training.ways.head import attach_backbone

    classifier = attach_backbone(job, head_alone).eval()
    optimizer = torch.optim.AdamW(classifier.head.parameters(), lr=job.params.train.learning_rate, weight_decay=0.0)
    loader = PreparedData(job, job.params.train.batch_size).train_dataloader()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            with torch.no_grad():
                embedding_nd = classifier.embed(batch.inputs)
            loss = functional.cross_entropy(classifier.head(embedding_nd), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier


def fit_sklearn(home: Home, rows: Any, strength: float) -> Any:
    """scikit-learn's head on the embeddings of some rows."""
    prepared = load_prepared(home.settings.prepared_dir)
    embedding_nd, _ = load_features(home.settings.features_dir, prepared)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000, tol=1e-8))
    return model.fit(embedding_nd[rows].astype(np.float64), prepared.label_n[rows])


def test_frozen_is_solved_to_what_scikit_learn_finds_with_the_same_choice_of_c(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="frozen", patience=7)  # random weights: not all is easy
    home.embed()
    digest = home.train()
    predictor, prepared = Predictor.load(home.settings.candidate_dir), load_prepared(home.settings.prepared_dir)
    embedding_nd, _ = load_features(home.settings.features_dir, prepared)
    train, val = prepared.rows("train"), prepared.rows("val")
    ours = predictor.run_batches(prepared.read(val))
    metrics = home.run.data.metrics
    curve = {
        name: [point.value for point in home.tracking._connect()[0].get_metric_history(home.run.info.run_id, name)]
        for name in ("solver/C", "solver/val_loss", "solver/val_accuracy", "solver/train_loss")
    }
    losses = []
    for strength, loss in zip(curve["solver/C"], curve["solver/val_loss"], strict=True):
        theirs = fit_sklearn(home, train, strength).predict_proba(embedding_nd[val])
        losses.append(-np.log(theirs[np.arange(len(val)), prepared.label_n[val]]).mean())
        assert loss == pytest.approx(losses[-1], abs=1e-3)
    assert metrics["best/C"] == curve["solver/C"][int(np.argmin(losses))]
    assert len(losses) >= 4
    theirs = fit_sklearn(home, train, metrics["best/C"]).predict_proba(embedding_nd[val])
    np.testing.assert_allclose(ours.probs_nk, theirs, atol=2e-2)

    accuracy = (ours.logits_nk.argmax(1) == prepared.label_n[val]).mean()
    (report,) = home.notes.epochs
    assert report.metrics["val/accuracy"] == metrics["val/accuracy"] == pytest.approx(accuracy)
    assert metrics["val/loss"] == min(curve["solver/val_loss"]) == metrics["best/val_loss"]
    assert {"train/loss", "train/accuracy", "val/f1", "train/epoch_s"} <= set(metrics)
    assert (
        "head: solved without epochs; not used: train.batch_size, train.learning_rate, train.max_epochs, "
        "train.patience (`train.solver: epochs` uses them)"
    ) in home.notes.lines
    assert f"head: solved with C {metrics['best/C']:g} (the best of {len(losses)} by val/loss)" in home.notes.lines

    shutil.rmtree(home.settings.work_dir("train"))
    assert home.train() == digest, "the same input gives the same bytes"


def test_frozen_on_all_keeps_the_c_of_validation_and_learns_from_both_sides(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="frozen")
    home.embed()
    job = home.make_quiet_job()
    WAYS["frozen"](tmp_path, job, QUIET_RUN)
    chosen = job.tracking.only["metrics"][0]["best/C"]  # type: ignore[attr-defined]
    home.section |= {"on": "all", "monitor": "train/accuracy"}
    home.notes = Notes()
    job = home.make_quiet_job()
    head: Any = WAYS["frozen"](tmp_path, job, QUIET_RUN).head
    assert job.tracking.only["metrics"][0]["best/C"] == chosen  # type: ignore[attr-defined]
    rows = np.flatnonzero(np.isin(job.prepared.side_n, ("train", "val")))
    embedding_nd, _ = load_features(home.settings.features_dir, job.prepared)
    ours = head(torch.from_numpy(embedding_nd)).softmax(dim=1).detach().numpy()
    np.testing.assert_allclose(ours, fit_sklearn(home, rows, chosen).predict_proba(embedding_nd), atol=2e-2)
    train_alone = fit_sklearn(home, job.prepared.rows("train"), chosen).predict_proba(embedding_nd)
    assert np.abs(ours - train_alone).max() > 0.1
    (report,) = home.notes.epochs
    assert set(report.metrics) == {"train/loss", "train/accuracy"}
    accuracy = (ours[rows].argmax(1) == job.prepared.label_n[rows]).mean()
    assert report.metrics["train/accuracy"] == pytest.approx(accuracy)


def test_frozen_with_a_c_of_ones_own_chooses_nothing(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="frozen", weights="weights.safetensors", C=1e-4)
    home.embed()
    job = home.make_quiet_job()
    head: Any = WAYS["frozen"](tmp_path, job, QUIET_RUN).head
    assert "head: solved with C 0.0001 (given)" in home.notes.lines
    assert not [name for name in job.tracking.only["metrics"][0] if name.startswith("solver/")]  # type: ignore[attr-defined]
    assert float(head.weight.detach().abs().max()) > 0


def test_a_training_figure_chooses_no_penalty(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="frozen", weights="weights.safetensors", monitor="train/loss")
    home.embed()
    job = home.make_quiet_job()
    WAYS["frozen"](tmp_path, job, QUIET_RUN)
    assert "head: C is chosen by val/loss, since train/loss is best without any penalty" in home.notes.lines
    logged = job.tracking.only["metrics"]  # type: ignore[attr-defined]
    losses = [found["solver/val_loss"] for found in logged.values() if "solver/val_loss" in found]
    assert logged[0]["val/loss"] == min(losses)


def test_a_key_that_only_epochs_know_makes_the_head_learn_by_epochs(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="frozen", weights="weights.safetensors", dropout=0.1, max_epochs=2)
    home.embed()
    work = tmp_path / "work"
    work.mkdir()
    WAYS["frozen"](work, home.make_quiet_job(), QUIET_RUN)
    assert [report.epoch for report in home.notes.epochs] == [1, 2]
    assert (
        "head: learns by epochs, as train.dropout asks for (without it, it would be solved: train.solver)"
    ) in home.notes.lines
    home.section |= {"dropout": 0.0, "solver": "epochs"}
    home.notes = Notes()
    work = tmp_path / "work2"
    work.mkdir()
    WAYS["frozen"](work, home.make_quiet_job(), QUIET_RUN)
    assert [report.epoch for report in home.notes.epochs] == [1, 2]
    assert not [line for line in home.notes.lines if line.startswith("head:")]


def test_embeddings_that_do_not_belong_to_the_network_are_refused(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="knn")
    assert "are missing; expected those of the prepared data. Run `visionloop embed`." in home.refuse(DatasetError)
    home.section["way"] = "scratch"
    home.embed()
    home.section["way"] = "frozen"
    assert "are empty: `train.way` did not need any" in home.refuse(DatasetError)
    home.embed()
    home.section["weights"] = "weights.safetensors"
    refusal = home.refuse(DatasetError)
    assert "are of another network (small_cnn at 32 x 32, onnxruntime fp32, weights " in refusal
    assert "expected those of small_cnn with train.weights: weights.safetensors. Run `visionloop embed`." in refusal
    home.section |= {"weights": "none", "way": "knn", "neighbours": {"k": 1000}}
    assert "train.neighbours.k: got 1000 with " in home.refuse(ParamsError)


def test_the_head_is_joined_to_the_network_that_embed_exported(
    champion: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is exported once; where its file is gone or damaged, again, and the bundle has the same bytes."""
    exported: list[str] = []
    export = exports._export

    def listen(module: Any, example: Any, name: str, *rest: Any, **options: Any) -> Any:
        exported.append(name)
        return export(module, example, name, *rest, **options)

    monkeypatch.setattr(exports, "_export", listen)
    home = fork(champion, tmp_path / "ws", way="frozen", weights="weights.safetensors")
    home.embed()
    assert exported == ["images"]
    digest = home.train()
    assert exported == ["images", "embedding"]
    (graph,) = (home.settings.hidden_dir / "encoders").glob("*.onnx")
    for text in (b"", None):
        shutil.rmtree(home.settings.work_dir("train"))
        graph.unlink() if text is None else graph.write_bytes(text)
        exported.clear()
        assert home.train() == digest
        assert exported == ["images", "embedding"]
