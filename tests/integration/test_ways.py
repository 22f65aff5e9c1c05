"""The ways to train: neighbours that vote, and a start from the champion that forgets nothing; but not `frozen`."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional

from homes import CLASSES, NOW, QUIET_RUN, Home, fork
from visionloop.data.shards import load_prepared
from visionloop.errors import ParamsError
from visionloop.features.view import load_features
from visionloop.predictor import Predictor
from visionloop.promotion.ledger import append_entry, read_champion
from visionloop.training.ways import WAYS, prepare_learning
from visionloop.training.ways.network import choose_start


def measure_recall(predictor: Predictor, home: Home, name: str) -> float:
    """Of the images of a class that are not trained on, the share that is called so."""
    prepared = load_prepared(home.settings.prepared_dir)
    label = prepared.classes.index(name)
    rows = np.flatnonzero((prepared.side_n != "train") & (prepared.label_n == label))
    answers = predictor.answer(predictor.run_batches(prepared.read(rows)))
    return float(np.mean([answer.prediction == name for answer in answers]))


def test_every_way_of_the_parameters_is_here() -> None:
    from typing import get_args

    from visionloop.params.train import Way

    assert set(WAYS) == set(get_args(Way))


def test_knn_answers_as_scikit_learn_does(champion: Home, tmp_path: Path) -> None:
    neighbours = {"k": 7, "metric": "cosine", "vote": "distance", "smoothing": 1e-4}
    home = fork(champion, tmp_path / "ws", way="knn", weights="weights.safetensors", neighbours=neighbours)
    home.embed()
    home.train()
    predictor = Predictor.load(home.settings.candidate_dir)
    prepared = load_prepared(home.settings.prepared_dir)
    embedding_nd, _ = load_features(home.settings.features_dir, prepared)
    rows = {side: prepared.rows(side) for side in ("train", "val", "test")}
    theirs = KNeighborsClassifier(7, metric="cosine", weights="distance", algorithm="brute")
    theirs.fit(embedding_nd[rows["train"]].astype(np.float64), prepared.label_n[rows["train"]])
    held_out = np.concatenate([rows["val"], rows["test"]])
    ours = predictor.run_batches(prepared.read(held_out))
    np.testing.assert_allclose(ours.probs_nk, theirs.predict_proba(embedding_nd[held_out]), atol=5e-3)
    accuracy = (ours.logits_nk.argmax(1) == prepared.label_n[held_out])[: len(rows["val"])].mean()
    assert accuracy > 0.9

    (report,) = home.notes.epochs
    assert (report.epoch, report.max_epochs, report.monitor) == (1, 0, "val/loss")
    assert report.metrics["val/accuracy"] == pytest.approx(accuracy)
    assert home.run.data.metrics["val/accuracy"] == pytest.approx(accuracy)
    assert home.run.data.metrics["best/val_accuracy"] == pytest.approx(accuracy)
    assert {"val/loss", "val/f1"} <= set(home.run.data.metrics)


def test_knn_on_all_judges_each_training_image_by_the_others(champion: Home, tmp_path: Path) -> None:
    section = {"way": "knn", "weights": "weights.safetensors", "on": "all", "monitor": "train/accuracy"}
    home = fork(champion, tmp_path / "ws", **section, neighbours={"k": 1})
    home.embed()
    job = home.make_quiet_job()
    head: Any = WAYS["knn"](tmp_path, job, QUIET_RUN).head
    prepared = job.prepared
    rows = np.flatnonzero(np.isin(prepared.side_n, ("train", "val")))
    assert head.points_pd.shape == (len(rows), 64)
    embedding_nd, _ = load_features(home.settings.features_dir, prepared)
    theirs = KNeighborsClassifier(1, metric="cosine", algorithm="brute")
    theirs.fit(embedding_nd[rows].astype(np.float64), prepared.label_n[rows])
    others = theirs.kneighbors(n_neighbors=1, return_distance=False)[:, 0]
    expected = (prepared.label_n[rows][others] == prepared.label_n[rows]).mean()
    (report,) = home.notes.epochs
    assert set(report.metrics) == {"train/loss", "train/accuracy"}
    assert report.metrics["train/accuracy"] == pytest.approx(expected)


def test_warm_without_a_champion_starts_from_the_weights(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="warm")
    shutil.rmtree(home.folder / ".visionloop" / "store" / "ledger")
    job = home.make_job()
    assert job.start is None
    module, _ = prepare_learning(home.make_quiet_job(), QUIET_RUN)
    assert home.notes.lines[0] == "no champion of shapes yet: starts from train.weights (none)"
    home.section["way"] = "scratch"
    fresh, _ = prepare_learning(home.make_quiet_job(), QUIET_RUN)
    for ours, theirs in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_warm_on_a_champion_of_another_backbone_is_refused(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="warm", backbone="resnet18")
    digest = read_champion(home.store, "shapes").bundle[:12]  # type: ignore[union-attr]
    refusal = home.refuse(ParamsError)
    assert refusal.startswith("params.yaml train.backbone: got 'resnet18', but `way: warm` starts from champion ")
    assert f"champion {digest} of shapes; expected 'small_cnn', as it has." in refusal


def test_an_interrupted_warm_training_keeps_the_start_it_began_with(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="warm")
    first = read_champion(home.store, "shapes")
    assert first
    job = home.make_job()
    assert job.start == first.bundle
    facts = {"action": "promote", "model_version": "2", "decision": None, "dataset": {}, "run_id": None}
    append_entry(home.store, "shapes", first, bundle="f" * 64, by="x", why="x", at=NOW, **facts)
    assert home.make_job().start == "f" * 64
    work = home.settings.work_dir("train") / job.key[:16]
    work.mkdir(parents=True)
    (work / "run.json").write_text("{}")
    assert choose_start(replace(job, start=None)).start == first.bundle
    assert home.make_job().start == first.bundle
    home.section["learning_rate"] = 1e-4
    assert home.make_job().start == "f" * 64, "other inputs are another training"


def test_warm_on_all_data_forgets_nothing_where_going_on_with_the_new_does(champion: Home, tmp_path: Path) -> None:
    home = fork(champion, tmp_path / "ws", way="warm", max_epochs=6)
    before = Predictor.load(home.settings.candidate_dir)
    old = frozenset(load_prepared(home.settings.prepared_dir).sha256_n)
    draw_crosses(home.folder / "photos" / "disc", 90)
    home.ingest()
    recalls = {name: measure_recall(before, home, name) for name in CLASSES}
    assert min(recalls["bar"], recalls["ring"]) > 0.9
    champion_digest = before.digest
    home.train()
    after = Predictor.load(home.settings.candidate_dir)
    for name in ("bar", "ring"):
        assert measure_recall(after, home, name) > recalls[name] - 0.02, name

    line = f"starts from champion {champion_digest[:12]}: 3 of its 3 classes kept"
    assert line in home.notes.lines
    assert after.card.network["started_from"] == champion_digest
    assert home.run.data.tags["visionloop.started_from"] == champion_digest
    assert measure_recall(after, home, "disc") > recalls["disc"] + 0.2, "what is new is learned"

    naive = continue_naively(home, old)
    prepared = load_prepared(home.settings.prepared_dir)
    rows = np.flatnonzero((prepared.side_n != "train") & (prepared.label_n != prepared.classes.index("disc")))
    with torch.no_grad():
        answers = naive(torch.from_numpy(prepared.read(rows)))[0].argmax(1).numpy()
    assert (answers == prepared.label_n[rows]).mean() < 0.5, "going on with the new images alone forgets the rest"


def draw_crosses(folder: Path, number: int) -> None:
    """Draw what the champion takes for no disc, as more images of that class."""
    rng = np.random.default_rng(7)
    for i in range(number):
        ground, ink = (tuple(int(c) for c in rng.integers(low, low + 90, 3)) for low in (0, 160))
        image = Image.new("RGB", (40, 40), ground)
        draw, (x, y, r) = ImageDraw.Draw(image), (int(v) for v in rng.integers((13, 13, 8), (27, 27, 12)))
        draw.line((x - r, y - r, x + r, y + r), fill=ink, width=3)
        draw.line((x - r, y + r, x + r, y - r), fill=ink, width=3)
        image.save(folder / f"cross-{i:03d}.png")


def continue_naively(home: Home, old: frozenset[str]) -> torch.nn.Module:
    """Go on from the champion's weights with the new images alone, for as many epochs."""
    job = home.make_quiet_job()
    module, _ = prepare_learning(job, QUIET_RUN)
    classifier, prepared = module.classifier, job.prepared
    disc = prepared.classes.index("disc")
    rows = np.asarray([r for r in job.train_rows if prepared.label_n[r] == disc and prepared.sha256_n[r] not in old])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=job.params.train.learning_rate)
    classifier.train()
    for epoch in range(job.params.train.max_epochs):
        for part in np.array_split(np.random.default_rng(epoch).permutation(rows), len(rows) // 16):
            units_nu, _ = classifier(torch.from_numpy(prepared.read(part)))
            loss = functional.cross_entropy(units_nu, torch.full((len(part),), disc))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()
