"""A head on a frozen network: from visionloop's embedding table against a pass over the images in each epoch (ten of
them), and solved to convergence against scikit-learn's.

The baseline is what a tutorial teaches: image files, Pillow, a DataLoader with 4 workers, the frozen network in eager
fp32 at every step, AdamW on the head. Both train and validate on the same images. Ours is timed with an empty table
(each image goes through the backbone once) and with a full one (no image does). Weights are random: the times do not
depend on them, and nothing has to be downloaded.
"""

import io
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from commands import make_workspace, run_visionloop
from epoch import IMAGENET_MEAN, IMAGENET_STD, WORKERS, make_photos
from row import Row
from runs import load_workspace, make_bench_job
from visionloop.data.manifest import make_image_key
from visionloop.store import open_store
from visionloop.workspace import connect

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 10, 32, 1e-3, 1e-4
GOALS = {"empty": 8, "warm": 50}
NUM_TRAIN, NUM_VAL, NUM_FEATURES, NUM_CLASSES = 5_000, 1_000, 1_280, 20
GOAL_S = 2.0


@dataclass(frozen=True)
class Learned:
    """The time in which a head was trained, and its best validation accuracy."""

    seconds: float
    accuracy: float


def bench_frozen(bench_dir: Path, photos: Path | None, *, size_px: int, backbone: str = "resnet18") -> list[Row]:
    """Train a head both ways; `photos` holds train/CLASS/*, else synthetic JPEGs are made."""
    photos = photos or make_photos(bench_dir / "photos")
    workspace = prepare_workspace(bench_dir / "frozen", photos, backbone, size_px=size_px)
    shutil.rmtree(workspace / ".visionloop" / "store" / "embeddings", ignore_errors=True)
    ours = {"empty": learn_by_table(workspace), "warm": learn_by_table(workspace)}
    plain = learn_plainly(workspace)
    for name, one in ours.items():
        points = 100 * abs(one.accuracy - plain.accuracy)
        print(
            f"frozen, table {name}: {one.seconds:.1f} s, accuracy {one.accuracy:.4f}; plain: {plain.seconds:.1f} s, "
            f"{plain.accuracy:.4f} ({points:.2f} points apart; goal 0.3, and {GOALS[name]} x)",
            file=sys.stderr,
        )
    return [
        Row(f"{EPOCHS} frozen epochs, table {name}", EPOCHS / one.seconds, EPOCHS / plain.seconds, "epochs/s", "Pillow")
        for name, one in ours.items()
    ] + [bench_head()]


def bench_head() -> Row:
    """Solve a head and choose its C, ours and scikit-learn's, on features like the output of a ReLU."""
    rng = np.random.default_rng(0)
    num = NUM_TRAIN + NUM_VAL
    mixing_dd = rng.normal(size=(NUM_FEATURES, NUM_FEATURES)) * np.arange(1, NUM_FEATURES + 1)[:, None] ** -0.7
    label_n = rng.integers(0, NUM_CLASSES, num)
    hidden_nd = rng.normal(size=(num, NUM_FEATURES))
    hidden_nd[:, :60] += 0.4 * rng.normal(size=(NUM_CLASSES, 60))[label_n]
    embedding_nd = np.maximum(hidden_nd @ mixing_dd, 0).astype(np.float32)
    solve_plainly(embedding_nd, label_n, strengths=(1e-5,))  # threads and libraries are there
    solve_ours(embedding_nd, label_n)
    ours, strengths = solve_ours(embedding_nd, label_n)
    plain = solve_plainly(embedding_nd, label_n, strengths=strengths)
    points = 100 * abs(ours.accuracy - plain.accuracy)
    print(
        f"head solved: {ours.seconds:.2f} s (goal {GOAL_S:g}), accuracy {ours.accuracy:.4f}; scikit-learn: "
        f"{plain.seconds:.1f} s, {plain.accuracy:.4f} ({points:.2f} points apart; goal 0.3)",
        file=sys.stderr,
    )
    what = f"a head solved with the best C, {NUM_TRAIN:,} x {NUM_FEATURES:,}, {NUM_CLASSES} classes"
    return Row(what, 1 / ours.seconds, 1 / plain.seconds, "heads/s", f"scikit-learn, the same {len(strengths)} C")


def solve_ours(embedding_nd: np.ndarray, label_n: np.ndarray) -> tuple[Learned, tuple[float, ...]]:
    """Do what the way `frozen` does with its table; return also which values of C were tried."""
    import torch

    from visionloop.training.losses import Objective, compute_figures, make_targets
    from visionloop.training.ways.head import GIVE_UP_AFTER, LEAST_GAIN
    from visionloop.training.ways.logistic import STRENGTHS, Regression, compute_scaling

    started = time.perf_counter()
    train_nd, val_nd = (torch.from_numpy(part.copy()) for part in (embedding_nd[:NUM_TRAIN], embedding_nd[NUM_TRAIN:]))
    targets, val_targets = torch.from_numpy(label_n[:NUM_TRAIN]), torch.from_numpy(label_n[NUM_TRAIN:])
    scaling = compute_scaling(train_nd)
    scaling.apply(val_nd)
    targets_nu = make_targets(targets, "multiclass", NUM_CLASSES)
    regression = Regression(scaling.apply(train_nd), targets_nu, Objective("multiclass"))
    found: list[tuple[float, float]] = []
    lowest, wait = float("inf"), 0
    for solution in regression.solve_path(STRENGTHS):
        figures = compute_figures(val_nd @ solution.weight_ud.T + solution.bias_u, val_targets, "multiclass")
        found.append((figures["val/loss"], figures["val/accuracy"]))
        lowest, wait = (found[-1][0], 0) if found[-1][0] < lowest - LEAST_GAIN else (lowest, wait + 1)
        if wait == GIVE_UP_AFTER:
            break
    return Learned(time.perf_counter() - started, min(found)[1]), STRENGTHS[: len(found)]


def solve_plainly(embedding_nd: np.ndarray, label_n: np.ndarray, *, strengths: tuple[float, ...]) -> Learned:
    """Fit scikit-learn's head for the same values of C, each from the one before, and take the best on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    started = time.perf_counter()
    scaler = StandardScaler().fit(embedding_nd[:NUM_TRAIN])
    train_nd, val_nd = scaler.transform(embedding_nd[:NUM_TRAIN]), scaler.transform(embedding_nd[NUM_TRAIN:])
    model = LogisticRegression(max_iter=1_000, warm_start=True)
    found: list[tuple[float, float]] = []
    for strength in strengths:
        model.set_params(C=strength).fit(train_nd, label_n[:NUM_TRAIN])
        probs_nk = model.predict_proba(val_nd)
        found.append((log_loss(label_n[NUM_TRAIN:], probs_nk), model.score(val_nd, label_n[NUM_TRAIN:])))
    return Learned(time.perf_counter() - started, min(found)[1])


def prepare_workspace(workspace: Path, photos: Path, backbone: str, *, size_px: int) -> Path:
    """Make a workspace for the way `frozen` and prepare its images: not counted, as it runs once for a dataset."""
    learning: dict[str, object] = {"backbone": backbone, "way": "frozen", "weights": "none", "augment": "none"}
    learning |= {"max_epochs": EPOCHS, "patience": EPOCHS, "batch_size": BATCH_SIZE, "schedule": "constant"}
    learning |= {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    make_workspace(workspace, "horses-or-humans", prepare={"image_size": size_px}, train=learning)
    if not (workspace / "data" / "dataset.json").is_file():
        run_visionloop(workspace, "ingest", str(photos.resolve()))
    run_visionloop(workspace, "prepare")
    return workspace


def learn_by_table(workspace: Path) -> Learned:
    """Run `embed`, and what `train` does before it writes a bundle."""
    from visionloop.features.embed import embed
    from visionloop.training.fit import learn

    settings, params, _ = load_workspace(workspace)
    work = workspace / ".visionloop" / "bench-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started = time.perf_counter()
    embed(connect(settings, params, store=open_store(settings.store_url)))
    job = make_bench_job(workspace)
    run_id = job.tracking.open_run("frozen", run_id=None, tags={}, params={})
    outcome = learn(job, work, run_id)
    seconds = time.perf_counter() - started
    job.tracking.close_run(run_id)
    return Learned(seconds, outcome.metrics["val/accuracy"])


def learn_plainly(workspace: Path) -> Learned:
    """Train the same head with a pass of all images through the network in each epoch."""
    import torch
    from torch import nn
    from torch.nn import functional

    from visionloop.networks.weights import load_backbone

    job = make_bench_job(workspace)
    prepared, section = job.prepared, job.params.train
    backbone, num_features = load_backbone(section, prepared.size_hw, job.settings.home)
    backbone = backbone.to(memory_format=torch.contiguous_format).eval()
    head = nn.Linear(num_features, len(prepared.classes))
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    train_loader, val_loader = (make_loader(job, rows) for rows in (job.train_rows, job.val_rows))
    best = (float("inf"), 0.0)
    started = time.perf_counter()
    for _ in range(EPOCHS):
        for images_nchw, label_n in train_loader:
            with torch.no_grad():
                embedding_nd = backbone(images_nchw)
            loss = functional.cross_entropy(head(embedding_nd), label_n)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            pairs = [(head(backbone(images_nchw)), label_n) for images_nchw, label_n in val_loader]
        logits_nk, label_n = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        accuracy = float((logits_nk.argmax(1) == label_n).float().mean())
        best = min(best, (float(functional.cross_entropy(logits_nk, label_n)), accuracy))
    return Learned(time.perf_counter() - started, best[1])


def make_loader(job: Any, rows: np.ndarray) -> Any:
    """Return batches of encoded images, decoded and resized by Pillow in worker processes."""
    from torch.utils.data import DataLoader

    prepared = job.prepared
    keys = [make_image_key(prepared.sha256_n[row]) for row in rows]
    files = ImageFiles(job.settings.store_url, keys, prepared.label_n[rows].tolist(), prepared.size_hw)
    return DataLoader(files, BATCH_SIZE, shuffle=len(rows) == len(job.train_rows), num_workers=WORKERS)


class ImageFiles:
    """Image files and their classes, as torchvision's ImageFolder gives them."""

    def __init__(self, store_url: str, keys: list[str], labels: list[int], size_hw: tuple[int, int]) -> None:
        self.store_url, self.keys, self.labels, self.size_hw = store_url, keys, labels, size_hw

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image
        from torchvision import transforms

        image = Image.open(io.BytesIO(open_store(self.store_url).get(self.keys[index]))).convert("RGB")
        pixels_chw = transforms.functional.to_tensor(transforms.functional.resize(image, list(self.size_hw)))
        return transforms.functional.normalize(pixels_chw, IMAGENET_MEAN, IMAGENET_STD), self.labels[index]
