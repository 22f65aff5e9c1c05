"""What is tuned on a validation side, all of it together: promises hold on new images, and refusals are told."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fakes import make_card
from visionloop.confidence import compute_distances, compute_probs, find_abstained, pick_reference
from visionloop.evaluation.promises import find_promise
from visionloop.evaluation.tuning import (
    NEIGHBOURS,
    Validation,
    _tune_abstain,
    choose_distance,
    compute_left_out_distances,
    describe_refusal,
    tune_card,
)
from visionloop.params.train import Abstain, Threshold
from visionloop.predictor import check_card, choose_classes, compute_confidence
from visionloop.records import Card

PLAIN = Threshold(at=0.5)


def draw(rng: np.random.Generator, number: int, num_classes: int = 3, sharpness: float = 10.0) -> Validation:
    """A model that is too sure of itself, and right in some 95 of 100 images."""
    truth_n = rng.integers(0, num_classes, number)
    logits_nk = rng.normal(0, 1, (number, num_classes)) + 3.3 * (np.arange(num_classes) == truth_n[:, None])
    if num_classes == 2:
        logits_nk = np.column_stack([np.zeros(number), logits_nk[:, 1] - logits_nk[:, 0]])
    embedding_nd = rng.normal(0, 1, (number, 8)) + 4
    logits_nk = (logits_nk * sharpness).astype(np.float32)
    return Validation(logits_nk, embedding_nd.astype(np.float32), truth_n, np.arange(number))


def pick(all_of: Validation, rows_n: np.ndarray) -> Validation:
    return Validation(*(value[rows_n] for value in vars(all_of).values()))


def answer(card: Card, images: Validation, reference: Validation | None) -> tuple[np.ndarray, np.ndarray]:
    """Whether each answer is right, and which are abstained from, as a predictor does it."""
    probs_nk = compute_probs(images.logits_nk, card)
    chosen = choose_classes(probs_nk, card)
    distance_n = None
    if reference is not None:
        distance_n = compute_distances(images.embedding_nd, pick_reference(reference.embedding_nd), NEIGHBOURS)
    return chosen == images.truth, find_abstained(compute_confidence(probs_nk, chosen), distance_n, card)


@pytest.mark.parametrize(
    ("num_classes", "threshold", "with_biases"),
    [(2, PLAIN, False), (2, Threshold(max_f1=True), True), (6, PLAIN, True)],
)
@pytest.mark.parametrize("number", [30, pytest.param(100, marks=pytest.mark.long)])
def test_bound_holds_in_93_of_100_random_splits(
    num_classes: int, threshold: Threshold, with_biases: bool, number: int
) -> None:
    rng = np.random.default_rng(num_classes)
    everything = draw(rng, 20_000, num_classes)
    card = make_card(tuple("abcdef"[:num_classes]))
    wanted = Abstain(error=0.01)
    held, shares = 0, []
    for _ in range(number):
        rows_n = rng.permutation(20_000)
        validation, fresh = pick(everything, rows_n[:1500]), pick(everything, rows_n[1500:7500])
        tuned, lines = tune_card(card, validation, threshold, wanted, with_biases=with_biases)
        assert tuned.abstain is not None, lines
        hits_n, abstained_n = answer(tuned, fresh, validation)
        held += (~hits_n[~abstained_n]).mean() <= 0.01
        shares.append((~abstained_n).mean())
        assert tuned.temperature == pytest.approx(10 / 3.3, rel=0.5)
    assert held >= 0.93 * number
    assert np.mean(shares) > 0.6


def test_what_was_not_seen_is_not_answered_and_what_was_seen_is() -> None:
    rng = np.random.default_rng(3)
    validation, same = draw(rng, 400), draw(rng, 4000)
    other = replace(same, embedding_nd=(rng.normal(0, 1, (4000, 8)) - 4).astype(np.float32))
    tuned, lines = tune_card(make_card(), validation, PLAIN, Abstain(error=None, coverage=0.95), with_biases=False)
    assert tuned.abstain is not None
    assert (tuned.abstain["confidence"], tuned.abstain["neighbours"]) == (None, NEIGHBOURS)
    assert "abstain: where the 5th nearest validation image is farther than" in lines[-1]
    assert answer(tuned, same, validation)[1].mean() == pytest.approx(0.05, abs=0.025)
    assert answer(tuned, other, validation)[1].mean() == 1.0


def test_coverage_is_kept_on_average_over_draws() -> None:
    rng = np.random.default_rng(4)
    shares = []
    for _ in range(60):
        validation, fresh = draw(rng, 120), draw(rng, 500)
        limit = choose_distance(compute_left_out_distances(validation.embedding_nd, validation.key_n), 0.9)
        reference_rd = pick_reference(validation.embedding_nd)
        shares.append((compute_distances(fresh.embedding_nd, reference_rd, NEIGHBOURS) <= limit).mean())
    assert np.mean(shares) == pytest.approx(0.9, abs=0.02)


def test_frames_of_the_same_film_are_not_its_neighbours() -> None:
    # Each film is a spot of its own: a frame has near neighbours in its own film only, and a new film has none.
    rng = np.random.default_rng(5)
    spot_gd = rng.normal(0, 1, (40, 16))
    key_n = np.repeat(np.arange(40), 10)
    embedding_nd = (spot_gd[key_n] + rng.normal(0, 0.01, (400, 16))).astype(np.float32)
    by_film = choose_distance(compute_left_out_distances(embedding_nd, key_n), 0.95)
    by_frame = choose_distance(compute_left_out_distances(embedding_nd, np.arange(400)), 0.95)
    assert by_film is not None and by_frame is not None
    fresh_nd = rng.normal(0, 1, (300, 16)).astype(np.float32)
    distance_n = compute_distances(fresh_nd, pick_reference(embedding_nd), NEIGHBOURS)
    assert (distance_n <= by_film).mean() > 0.9
    assert (distance_n <= by_frame).mean() == 0.0


def test_what_cannot_be_promised_is_no_rule_and_is_told() -> None:
    validation = draw(np.random.default_rng(6), 60)
    tuned, lines = tune_card(make_card(), validation, PLAIN, Abstain(error=0.02), with_biases=False)
    assert tuned.abstain is None
    assert tuned.tuning is not None and tuned.tuning["abstain"]["promised"] is None
    assert tuned.tuning["abstain"]["best_bound"] > 0.02
    assert lines[-1].startswith("LOOK: abstain: at most 2.00% wrong cannot be promised with")
    assert " independent validation images" in lines[-1]
    assert "it takes 149 without a mistake" in lines[-1]
    assert lines[-1].endswith("The model answers everything. Add images, or raise train.abstain.error")


@pytest.mark.parametrize(
    ("right", "told"), [(68, "5.28% (0 wrong among the surest 68)"), (45, "13.87% (0 wrong among")]
)
def test_the_lowest_bound_told_is_no_lower_than_the_best_of_so_many_images(right: int, told: str) -> None:
    promise = find_promise(np.linspace(1, 0, 68), np.arange(68) < right, 0.02, 0.05)
    words = describe_refusal(promise, Abstain(error=0.02))
    assert "it takes 149 without a mistake, and these could promise 5.28% at best" in words
    assert f"The lowest bound that was reached is {told}" in words


def test_frames_promise_no_more_than_their_films() -> None:
    validation = replace(draw(np.random.default_rng(7), 1500), key_n=np.repeat(np.arange(15), 100))
    tuned, lines = tune_card(make_card(), validation, PLAIN, Abstain(error=0.05), with_biases=False)
    assert tuned.abstain is None
    assert (tuned.tuning or {})["num_keys"] == 15
    assert any("15 independent validation images are too few" in line for line in lines)


def test_classes_of_several_labels_have_thresholds_of_their_own() -> None:
    rng = np.random.default_rng(8)
    logits_nk = rng.normal(-1, 2, (3000, 3)).astype(np.float32)
    truth_nk = rng.random((3000, 3)) < 1 / (1 + np.exp(-(logits_nk - np.array([0.0, 1.0, 3.0]))))
    validation = Validation(logits_nk, logits_nk, truth_nk, np.arange(3000))
    card = make_card(task="multilabel")
    tuned, _ = tune_card(card, validation, Threshold(recall=0.9), None, with_biases=True)
    assert tuned.biases is not None and tuned.biases["c"] == pytest.approx(-3.0, abs=0.4)
    assert tuned.thresholds is not None and len(set(tuned.thresholds.values())) == 3
    chosen_nk = choose_classes(compute_probs(logits_nk, tuned), tuned)
    recall_k = (chosen_nk & truth_nk).sum(axis=0) / truth_nk.sum(axis=0)
    assert (recall_k >= 0.9).all() and (recall_k < 0.95).all()
    assert (tuned.tuning or {})["threshold"]["wanted"] == {"recall": 0.9}


def test_the_card_is_json_the_same_each_time_and_passes_its_check() -> None:
    validation = draw(np.random.default_rng(9), 900, 2)
    cards = [
        tune_card(make_card(("a", "b")), validation, Threshold(precision=0.9), Abstain(error=0.05), with_biases=True)[0]
        for _ in range(2)
    ]
    texts = [json.dumps(card.to_json(), sort_keys=True, allow_nan=False) for card in cards]
    assert texts[0] == texts[1]
    again = Card.from_json(json.loads(texts[0]))
    check_card(again, "bundle")
    assert (again.abstain, again.biases, again.tuning) == (cards[0].abstain, cards[0].biases, cards[0].tuning)
    assert again.schema == 2


@pytest.mark.parametrize("number", [1, 2, 5, 19])
def test_very_few_images_end_in_words(number: int) -> None:
    validation = draw(np.random.default_rng(number), number, 2)
    tuned, lines = tune_card(
        make_card(("a", "b")), validation, Threshold(max_f1=True), Abstain(error=0.02), with_biases=True
    )
    assert (tuned.temperature, tuned.biases, tuned.abstain) == (1.0, None, None)
    assert sum(line.startswith("LOOK:") for line in lines) >= 1
    json.dumps(tuned.to_json(), allow_nan=False)


def test_images_all_alike_and_embeddings_of_nothing_end_in_numbers() -> None:
    label_n = np.arange(400) % 2
    logits_nk = np.column_stack([np.zeros(400), np.where(label_n, 9.0, -9.0)]).astype(np.float32)
    validation = Validation(logits_nk, np.zeros((400, 4), np.float32), label_n, np.arange(400))
    tuned, _ = tune_card(make_card(("a", "b")), validation, PLAIN, Abstain(error=0.02), with_biases=False)
    assert tuned.abstain is not None
    assert not answer(tuned, validation, validation)[1].any()


@pytest.mark.parametrize(("size", "is_told"), [(9.0, True), (3.0, False)])
def test_a_limit_among_saturated_confidences_is_told_as_a_lottery(size: float, is_told: bool) -> None:
    validation = draw(np.random.default_rng(11), 600)
    said_n = np.where(np.arange(600) < 40, (validation.truth + 1) % 3, validation.truth)
    sure_n = np.where(np.arange(600) < 40, size - 1, size + np.arange(600) / 6000)  # what is wrong is less sure
    logits_nk = np.where(np.arange(3) == said_n[:, None], sure_n[:, None], 0).astype(np.float32)
    facts: dict[str, object] = {}
    card, probs_nk = make_card(), compute_probs(logits_nk, make_card())
    wanted = Abstain(error=0.02, coverage=None)
    tuned, lines = _tune_abstain(card, replace(validation, logits_nk=logits_nk), probs_nk, wanted, facts)
    assert tuned.abstain is not None and (tuned.abstain["confidence"] > 0.999) is is_told
    assert "answers from confidence 1 on" not in lines[0]
    assert any("near to a lottery" in line for line in lines) is is_told


def test_the_distance_is_taken_before_the_promise() -> None:
    # All mistakes are on images that are unlike the others: left out by distance, they cost the promise nothing.
    rng = np.random.default_rng(10)
    validation = draw(rng, 600)
    odd_n = np.arange(600) % 25 == 0
    said_n = np.where(odd_n, (validation.truth + 1) % 3, validation.truth)
    logits_nk = np.where(np.arange(3) == said_n[:, None], 9.0, -9.0)
    embedding_nd = np.where(odd_n[:, None], rng.normal(0, 1, (600, 8)), validation.embedding_nd)
    mixed = replace(validation, logits_nk=logits_nk.astype(np.float32), embedding_nd=embedding_nd.astype(np.float32))
    with_distance, _ = tune_card(make_card(), mixed, PLAIN, Abstain(error=0.02), with_biases=False)
    without, _ = tune_card(make_card(), mixed, PLAIN, Abstain(error=0.02, coverage=None), with_biases=False)
    assert with_distance.abstain is not None
    assert without.abstain is None


@pytest.mark.parametrize(("at", "is_told"), [(0.99999, True), (0.5, False)])
def test_a_number_for_a_threshold_is_told_with_what_it_does(at: float, is_told: bool) -> None:
    validation = draw(np.random.default_rng(1), 200, 2, sharpness=1.0)
    tuned, lines = tune_card(make_card(("horses", "humans")), validation, Threshold(at=at), None, with_biases=False)
    told = [line for line in lines if line.startswith("threshold of humans: 0.99999 (as params.yaml says: ")]
    assert (tuned.threshold, bool(told)) == (at, is_told)
    assert all(" of the validation images right, " in line for line in told)
