"""Suspected label errors: images whose nearest neighbours have another label. Writes no file.

The score is the normalised margin of confident learning (Northcutt, Jiang and Chuang, 2021). In place of a model's
probabilities it takes the votes of the k nearest other images, weighted by 1 / distance:

    score = share of the votes for the best other label - share of the votes for the given label     (-1 to 1)

Example: an image has the label cat. Its neighbours give 0.7 of the votes to dog, 0.2 to cat, 0.1 to fox: the score is
0.7 - 0.2 = 0.5, and dog is proposed. With several labels for an image each class is judged alone: the votes for it
against the votes without it.

An encoder that cannot tell the classes doubts what it likes. So first the neighbours must know more of the labels than
chance does: a permutation test (`neighbours.measure_agreement`) at the 5 % level.

Dimensions: n images, c classes.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.data.contact_sheet import Cell, draw_contact_sheet
from visionloop.errors import TrainingError
from visionloop.features.album import Album
from visionloop.features.encoder import Encoder
from visionloop.features.neighbours import (
    BLOCK,
    Agreement,
    DoubleArray,
    compute_votes_of_others,
    find_other_neighbours,
    measure_agreement,
)
from visionloop.records import defuse_cell

COLUMNS = ("sha256", "old", "new", "score", "side", "origin")
CELL_PX = 170
LEVEL = 0.05


@dataclass(frozen=True)
class Suspect:
    """An image whose label `old` should perhaps be `new` (empty: none). `score` is above 0 and at most 1."""

    row: int
    old: str
    new: str
    score: float


def find_suspects(
    album: Album, k: int = 10, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Suspect], Agreement | None]:
    """Return all labels that the neighbours contradict, the most suspicious first, and how far they agree with all.

    `on_progress`: as for `find_other_neighbours`.

    Raises:
        DatasetError: there are fewer than two images.
        TrainingError: the encoder cannot tell the classes.
    """
    prepared = album.prepared
    distance_nk, row_nk = find_other_neighbours(album.embedding_nd, k, on_progress=on_progress)
    agreement = measure_agreement(distance_nk, row_nk, album.target_nc)
    if agreement and agreement.p_value > LEVEL:
        raise TrainingError(
            f"encoder {album.encoder.facts.describe()}",
            f"cannot tell the classes: {agreement.describe()}",
            "neighbours that know more than chance",
            advise(album.encoder),
        )
    found: list[Suspect] = []
    for start in range(0, len(row_nk), BLOCK):  # the votes of all images would be 8 bytes a class and image
        rows = slice(start, start + BLOCK)
        votes_bc = compute_votes_of_others(distance_nk[rows], row_nk[rows], album.target_nc)
        if prepared.targets_nk is None:
            some = judge_labels(votes_bc, prepared.label_n[rows], prepared.classes)
        else:
            some = judge_several(votes_bc, prepared.targets_nk[rows], prepared.classes)
        found += [replace(one, row=one.row + start) for one in some]
    found.sort(key=lambda suspect: (-suspect.score, prepared.sha256_n[suspect.row], suspect.old))
    return found, agreement


def advise(encoder: Encoder) -> str:
    """Return what to do where an encoder sees little in the images."""
    if encoder.facts.source == "params" and encoder.facts.weights != "none":
        return "Use another train.backbone, or a trained model: `--encoder candidate`."
    return (
        "Use pretrained weights: `backbone: efficientnet_lite0` and `weights: default` under `train` in params.yaml, "
        "and `--encoder params`."
    )


def judge_labels(votes_nc: DoubleArray, label_n: NDArray[np.int64], classes: Sequence[str]) -> list[Suspect]:
    """Return the images for which another label has more votes than the given one. Each image has one label."""
    if len(classes) < 2:
        return []
    rows = np.arange(len(label_n))
    given_n = votes_nc[rows, label_n]
    others_nc = votes_nc.copy()
    others_nc[rows, label_n] = -1
    best_n = others_nc.argmax(axis=1)
    score_n = others_nc[rows, best_n] - given_n
    return [
        Suspect(int(row), classes[label_n[row]], classes[best_n[row]], round(float(score_n[row]), 4))
        for row in np.flatnonzero(score_n > 0)
    ]


def judge_several(votes_nc: DoubleArray, target_nc: NDArray[np.uint8], classes: Sequence[str]) -> list[Suspect]:
    """Return labels to remove, which most neighbours do not have, and labels to add, which most neighbours have.

    At most one label is added to an image: a line of `corrections.csv` names the old label, which is empty here, so two
    such lines of one image could not be told apart.
    """
    against_nc = np.where(target_nc > 0, 1 - 2 * votes_nc, 2 * votes_nc - 1)
    found = []
    for row in np.flatnonzero((against_nc > 0).any(axis=1)):
        scores = against_nc[row]
        for wrong in np.flatnonzero((scores > 0) & (target_nc[row] > 0)):
            found.append(Suspect(int(row), classes[int(wrong)], "", round(float(scores[wrong]), 4)))
        lacking = np.where(target_nc[row] > 0, -1.0, scores)
        best = int(lacking.argmax())
        if lacking[best] > 0:
            found.append(Suspect(int(row), "", classes[best], round(float(lacking[best]), 4)))
    return found


def encode_corrections(album: Album, suspects: Sequence[Suspect]) -> str:
    """Return suspects as a corrections.csv that `ingest.corrections` reads, with more columns that help to decide."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(COLUMNS)
    for suspect in suspects:
        sha256, side = album.prepared.sha256_n[suspect.row], album.records[suspect.row].side
        origin = defuse_cell(album.get_origin(suspect.row))
        writer.writerow([sha256, suspect.old, suspect.new, f"{suspect.score:.4f}", side, origin])
    return sink.getvalue()


def describe_for_machines(album: Album, agreement: Agreement | None, suspects: Sequence[Suspect]) -> dict[str, Any]:
    """Return what `suspects --json` prints, without the counts."""
    return {
        **album.describe_for_machines(),
        "agreement": vars(agreement) if agreement else None,
        "suspects": [
            {**album.describe_row(one.row), "old": one.old, "new": one.new, "score": one.score} for one in suspects
        ],
    }


def draw_suspects(album: Album, suspects: Sequence[Suspect], num_found: int) -> bytes:
    """Draw suspects as PNG, in the order given: `label -> what the neighbours say`, the score, the image's digits."""
    cells = [
        Cell(
            album.load_picture(s.row, CELL_PX),
            f"{s.old or '(no label)'} → {s.new or '(remove)'}",
            f"{s.score:.2f}  {album.prepared.sha256_n[s.row][:8]}  {album.records[s.row].side}",
        )
        for s in suspects
    ]
    pin = album.prepared.pin
    title = f"{pin.name} version {pin.version}: {len(cells)} of {num_found:,} suspected labels"
    return draw_contact_sheet(cells, title, cell_px=CELL_PX)
