"""The training curve, for the run's artifacts."""

from collections.abc import Sequence
from pathlib import Path

from visionloop.training.watch import EpochReport


def write_curve(reports: Sequence[EpochReport], path: Path) -> None:
    """Draw loss and accuracy over the epochs into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    epochs = [r.epoch for r in reports]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, names in ((left, ("train/loss", "val/loss")), (right, ("val/accuracy", "val/f1"))):
        for name in names:
            axes.plot(epochs, [r.metrics.get(name, float("nan")) for r in reports], marker="o", ms=3, label=name)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    left.set_ylabel("loss")
    right.set_ylabel("share")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
