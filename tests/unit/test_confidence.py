"""When a model does not know: what a card says is what happens, and a bad card is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import make_bundle, make_card, make_image
from visionloop.bundle import load_bundle, seal_bundle
from visionloop.confidence import (
    MAX_REFERENCE,
    compute_distances,
    compute_probs,
    describe_doubt,
    describe_limit,
    find_abstained,
    pick_reference,
    pick_rows,
)
from visionloop.errors import BundleError
from visionloop.predictor import Predictor, check_card
from visionloop.records import Card, canonical_json

RULE = {"confidence": 0.83, "distance": 0.5, "neighbours": 2}


def rewrite(folder: Path, **changes: Any) -> Card:
    """Change the card of a bundle, and the embeddings that it keeps (eight of ones)."""
    card = replace(load_bundle(folder).card, **changes)
    (folder / "card.json").write_bytes(canonical_json(card.to_json()))
    np.savez(folder / "reference.npz", embedding_nd=np.ones((8, 48), np.float32))
    seal_bundle(folder)
    return card


def test_probabilities_follow_temperature_and_biases() -> None:
    logits_nk = np.array([[0.0, 2.0, 4.0]], np.float32)
    plain = compute_probs(logits_nk, make_card())
    assert plain[0].tolist() == pytest.approx([0.01587624, 0.11731043, 0.86681333])
    tuned = replace(make_card(), temperature=2.0, biases={"c": -2.0, "a": 0.0, "b": 0.0})
    assert compute_probs(logits_nk, tuned)[0].tolist() == pytest.approx([0.21194156, 0.57611688, 0.21194156])
    several = replace(make_card(task="multilabel"), temperature=2.0, biases={"a": 0.0, "b": -1.0, "c": 1.0})
    assert compute_probs(logits_nk, several)[0].tolist() == pytest.approx([0.5, 0.5, 0.95257413])


def test_a_limit_is_still_answered_and_nonsense_is_not() -> None:
    card = replace(make_card(), abstain=RULE)
    confidence_n = np.float32([0.9, 0.5, 0.9, np.nan, 0.9])
    distance_n = np.float32([0.5, 0.1, 0.6, 0.1, np.nan])
    assert find_abstained(confidence_n, distance_n, card).tolist() == [False, True, True, True, True]
    assert find_abstained(np.array([0.83]), None, card).tolist() == [False]
    assert find_abstained(np.array([0.0]), None, make_card()).tolist() == [False]


@pytest.mark.parametrize(
    ("limit", "told"),
    [(0.8349, "0.835"), (0.99951, "0.9995"), (float(np.float32(0.99999)), "0.99999"), (1.0, "1")],
)
def test_a_limit_below_1_is_not_told_as_1(limit: float, told: str) -> None:
    assert describe_limit(limit) == told


def test_the_reason_has_as_many_digits_as_show_the_difference() -> None:
    card = replace(make_card(), abstain=RULE)
    assert describe_doubt(0.61, 0.1, card) == "confidence 0.61 < 0.83"
    assert describe_doubt(0.8299, None, card) == "confidence 0.8299 < 0.8300"
    assert describe_doubt(0.9, 0.62, card) == "unlike the validation images: distance 0.62 > 0.50"
    both = "confidence 0.10 < 0.83; unlike the validation images: distance 0.62 > 0.50"
    assert describe_doubt(0.1, 0.62, card) == both


def test_distances_are_those_of_directions() -> None:
    reference_rd = pick_reference(np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))
    found = compute_distances(np.array([[5.0, 0.0], [0.0, 0.0]], np.float32), reference_rd, 2)
    assert found.tolist() == pytest.approx([2**0.5, 2**0.5]), "the second nearest; nothing has no direction"
    assert compute_distances(np.ones((2, 2), np.float32), reference_rd, 4).tolist() == [np.inf, np.inf]
    assert len(pick_rows(3 * MAX_REFERENCE)) == MAX_REFERENCE
    assert pick_rows(3).tolist() == [0, 1, 2]


def test_a_predictor_says_why_it_does_not_know(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    rewrite(tmp_path / "b", abstain={"confidence": 1.01, "distance": None})
    predictor = Predictor.load(tmp_path / "b", threads=1)
    answer = predictor.predict([make_image(1)])[0]
    assert answer.abstained == f"confidence {answer.confidence:.2f} < 1.01"
    assert answer.to_json()["abstained"] == answer.abstained
    rewrite(tmp_path / "b", abstain={"confidence": None, "distance": 1e-9, "neighbours": 1})
    answer = Predictor.load(tmp_path / "b", threads=1).predict([make_image(1)])[0]
    assert (answer.abstained or "").startswith("unlike the validation images: distance ")
    rewrite(tmp_path / "b", abstain={"confidence": 0.0, "distance": 2.1, "neighbours": 8})
    assert Predictor.load(tmp_path / "b", threads=1).predict([make_image(1)])[0].abstained is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "has the temperature 0.0; expected a number above 0"),
        ({"temperature": float("nan")}, "has the temperature nan"),
        ({"temperature": "1"}, "has the temperature '1'"),
        ({"temperature": True}, "has the temperature True"),
        ({"biases": {"a": 0.0}}, "has biases for a; expected a number for each of a, b, c"),
        ({"biases": {"a": 0.0, "b": 0.0, "c": float("inf")}}, "has biases for a, b, c"),
        ({"biases": {}}, "has biases for nothing"),
        ({"abstain": "always"}, "has the abstain rule 'always'; expected numbers"),
        ({"abstain": {"confidence": "0.5"}}, "has the abstain rule"),
        ({"abstain": {"confidence": float("nan")}}, "has the abstain rule"),
        ({"abstain": {"distance": 0.5}}, "with a distance a count of `neighbours`"),
        ({"abstain": {"distance": 0.5, "neighbours": 0}}, "has the abstain rule"),
        ({"abstain": {"distance": 0.5, "neighbours": 1.5}}, "has the abstain rule"),
        ({"abstain": {"distance": 0.5, "neighbours": True}}, "has the abstain rule"),
    ],
)
def test_a_card_that_cannot_be_followed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError) as caught:
        check_card(replace(make_card(), **changes), "bundle x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", ["shape", "nan", "few", "none"])
def test_embeddings_that_give_no_distance_are_refused(tmp_path: Path, spoil: str) -> None:
    folder = tmp_path / "b"
    make_bundle(folder)
    rewrite(folder, abstain={"confidence": None, "distance": 0.5, "neighbours": 5})
    arrays = {"shape": np.ones(8), "nan": np.full((8, 48), np.nan), "few": np.ones((4, 48))}
    if spoil == "none":
        np.savez(folder / "reference.npz", other=np.ones(3))
    else:
        np.savez(folder / "reference.npz", embedding_nd=arrays[spoil].astype(np.float32))
    seal_bundle(folder)
    with pytest.raises(BundleError, match=r"reference\.npz (is damaged|has embeddings of shape)"):
        Predictor.load(folder, threads=1)
