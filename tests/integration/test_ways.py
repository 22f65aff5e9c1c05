"""The ways to train: a head on embeddings, neighbours that vote, and a start from the champion that forgets nothing."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from memory_tracking import MemoryTracking
from processors import RELATIVE, measure_distance
from shapes import write_shapes
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.data.prepare import prepare
from visionloop.data.shards import load_prepared
from visionloop.errors import DatasetError, ParamsError, VisionLoopError
from visionloop.features import encoder as encoders
from visionloop.features.embed import embed
from visionloop.features.view import load_features
from visionloop.ingest.pull import check_sources, pull
from visionloop.networks.classifier import Classifier
from visionloop.params import Params, make_params
from visionloop.predictor import Predictor
from visionloop.promotion.ledger import append_entry, read_champion
from visionloop.settings import Settings, load_settings
from visionloop.store import ObjectStore, open_store
from visionloop.tracking import MlflowTracking
from visionloop.training.checks import check_training
from visionloop.training.datamodule import PreparedData
from visionloop.training.fit import make_job, train
from visionloop.training.job import Call, Job
from visionloop.training.watch import EpochReport, Watcher
from visionloop.training.ways import WAYS, prepare_learning
from visionloop.training.ways.network import choose_start

NOW = "2026-01-01T00:00:00+00:00"
CLASSES = ("bar", "disc", "ring")
QUIET_RUN = f"{1:032x}"


class Notes(Watcher):
    """Keeps what a training tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.epochs: list[EpochReport] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def on_epoch(self, report: EpochReport) -> None:
        self.epochs.append(report)


class Home:
    """A workspace, used in this process."""

    def __init__(self, folder: Path, **section: Any) -> None:
        self.folder, self.notes = folder, Notes()
        fixed = {"backbone": "small_cnn", "batch_size": 16, "learning_rate": 3e-3, "precision": "fp32"}
        self.section: dict[str, Any] = {**fixed, **section}
        self.runtime = "onnxruntime"

    @property
    def params(self) -> Params:
        source = {"kind": "folder", "path": str(self.folder / "photos"), "name": "photos"}
        value = {"name": "shapes", "ingest": {"sources": [source]}, "prepare": {"image_size": 32}}
        return make_params({**value, "embed": {"runtime": self.runtime}, "train": self.section})

    @property
    def settings(self) -> Settings:
        (self.folder / "params.yaml").touch()
        return load_settings({}, self.folder)

    name = "shapes"

    @property
    def store(self) -> ObjectStore:
        return open_store(self.settings.store_url)

    @property
    def tracking(self) -> MlflowTracking:
        return MlflowTracking(self.settings.tracking_uri, self.settings.artifact_root, "shapes")

    def ingest(self) -> None:
        pull(self, sources=check_sources(self.params), now=NOW)
        prepare(self)

    def embed(self) -> None:
        embed(self)

    def make_job(self) -> Job:
        return make_job(self, check_training(self), Call(watcher=self.notes))

    def make_quiet_job(self) -> Job:
        """A job without an MLflow."""
        tracking = MemoryTracking()
        assert tracking.open_run("quiet", run_id=None, tags={}, params={}) == QUIET_RUN
        return replace(self.make_job(), tracking=tracking)

    def train(self) -> str:
        self.notes = Notes()
        note = train(self, check_training(self), Call(NOW, watcher=self.notes))
        assert note is not None
        self.run = self.tracking._connect()[0].get_run(note.run_id)
        return note.bundle

    def refuse(self, kind: type[VisionLoopError]) -> str:
        with pytest.raises(kind) as caught:
            self.train()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def promote(self) -> str:
        bundle = load_bundle(self.settings.candidate_dir)
        upload_bundle(self.store, bundle)
        facts = dict.fromkeys(("model_version", "by", "why", "at"), "x") | {"dataset": {}, "run_id": None}
        champion = read_champion(self.store, "shapes")
        append_entry(self.store, "shapes", champion, action="promote", bundle=bundle.digest, decision=None, **facts)
        return bundle.digest


def fork(home: Home, folder: Path, **section: Any) -> Home:
    shutil.copytree(home.folder, folder)
    return Home(folder, **{**home.section, **section})


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A workspace whose champion tells bars, discs and rings apart; its weights lie in weights.safetensors."""
    home = Home(tmp_path_factory.mktemp("ways") / "ws", max_epochs=10)
    write_shapes(home.folder / "photos", 60, classes=CLASSES)
    home.ingest()
    home.train()
    home.promote()
    shutil.copy(home.settings.candidate_dir / "weights.safetensors", home.folder)
    return home


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_learns_the_head_that_passes_through_the_backbone_would_give(
    champion: Home, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 both the embeddings and the head are computed in it; what is served is fp32."""
    options = {"way": "frozen", "weights": "weights.safetensors", "schedule": "constant", "weight_decay": 0.0}
    home = fork(champion, tmp_path / "ws", max_epochs=4, learning_rate=3e-2, precision=precision, **options)
    if precision == "bf16":
        monkeypatch.setattr(encoders, "list_candidates", lambda wanted, accelerator: ["torch bf16"])
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

    from visionloop.networks.weight_sources import read_weights

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
    curve = {step: found["solver/val_loss"] for step, found in job.tracking.only["metrics"].items()}  # type: ignore[attr-defined]
    assert job.tracking.only["metrics"][0]["val/loss"] == min(curve.values())  # type: ignore[attr-defined]


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
    assert (report.epoch, report.max_epochs, report.monitor) == (1, 1, "val/loss")
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
