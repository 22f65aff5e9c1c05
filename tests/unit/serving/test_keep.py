"""Which images are kept, and that the probability written down is the one they were kept with."""

import random
from pathlib import Path

import numpy as np
import pytest

from visionloop.bundle import seal_bundle
from visionloop.params import KeepImages
from visionloop.predictor import Predictor
from visionloop.serving.keep import BURST_S, NEIGHBOURS, Choice, Keeper, Novelty, Throttle

NOTHING = np.zeros((1, 4), np.float32)


class OneModel:
    """Stands for a predictor in tests without novelty: it is only handed on."""

    digest = "d"


def make_keeper(seed: int = 0, **rules: float) -> Keeper:
    return Keeper(KeepImages.model_validate(rules), now_s=0.0, draw=random.Random(seed))


def choose(keeper: Keeper, confidence: float, now_s: float = 0.0) -> Choice:
    return keeper.choose(OneModel(), [confidence], NOTHING, now_s)[0]  # type: ignore[arg-type]


def test_an_unsure_image_is_kept_for_certain_and_a_sure_one_by_the_share() -> None:
    keeper = make_keeper(confidence=0.8, random=0.25)
    assert choose(keeper, 0.5) == Choice(True, 1.0, "confidence|random")
    sure = [choose(keeper, 0.8) for _ in range(100)]
    assert {(one.probability, one.reason) for one in sure} == {(0.25, "random")}
    assert 10 < sum(one.is_kept for one in sure) < 45


def test_what_no_reason_speaks_for_is_not_kept_and_a_confidence_that_is_no_number_is() -> None:
    keeper = make_keeper(confidence=0.8)
    assert choose(keeper, 0.9) == Choice(False, 0.0, None)
    assert choose(keeper, float("nan")) == Choice(True, 1.0, "confidence")


def test_the_throttle_halves_the_chance_for_each_step_above_the_budget() -> None:
    throttle = Throttle(360, 0.0)
    for _ in range(int(BURST_S * 0.1)):
        assert throttle.get_factor(0.0) == 1.0
        throttle.count()
    for _ in range(18):
        throttle.count()
    assert throttle.get_factor(0.0) == pytest.approx(0.5)
    assert throttle.get_factor(90.0) == pytest.approx(2**-0.5)  # 9 of the 18 were earned since
    assert throttle.get_factor(1e9) == 1.0
    assert throttle.get_factor(0.0) == 1.0  # a clock that goes back earns nothing


def test_of_a_flood_about_as_many_are_kept_as_an_hour_may_have() -> None:
    keeper = make_keeper(random=1.0, per_hour=360)
    kept = np.array([choose(keeper, 1.0, now_s=i * 0.2).is_kept for i in range(18_000 * 3)])  # 5 a second, 3 hours
    by_hour = kept.reshape(3, -1).sum(axis=1)
    assert by_hour[0] < 360 + 60 + 8 * 18  # the burst, and log2(50) steps, with what chance adds
    assert by_hour[1:].tolist() == pytest.approx([360, 360], abs=25)


def test_weighted_kept_images_estimate_the_mean_of_all_without_bias() -> None:
    """Unsure images are wrong more often and are kept more often, from a stream of ten times what may be kept."""
    generator = np.random.default_rng(0)
    num, runs = 600, 200
    weighted, plain, truth = [], [], []
    for seed in range(runs):
        confidence_n = generator.uniform(0.5, 1.0, num)
        is_wrong_n = generator.random(num) < 1 - confidence_n
        keeper = make_keeper(seed, confidence=0.6, random=0.1, per_hour=360)
        choices = [choose(keeper, c, now_s=i * 0.5) for i, c in enumerate(confidence_n.tolist())]
        kept_n = np.array([one.is_kept for one in choices])
        weight_n = kept_n / np.array([one.probability for one in choices])
        truth.append(is_wrong_n.mean())
        weighted.append((is_wrong_n * weight_n).sum() / num)
        plain.append(is_wrong_n[kept_n].mean())
    error = np.array(weighted) - np.array(truth)
    assert abs(error.mean()) < 3 * error.std() / np.sqrt(runs)
    assert error.std() / np.sqrt(runs) < 0.01  # the test can see a bias of a few hundredths
    assert np.mean(plain) - np.mean(truth) > 0.05  # what leaving the weights out would cost


def test_novel_is_what_is_farther_than_the_share_of_the_reference() -> None:
    generator = np.random.default_rng(0)
    near = generator.normal([5, 0, 0, 0], 0.5, (200, 4)).astype(np.float32)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    novelty = Novelty(near, 0.9)
    assert novelty.find(np.array([[0, 1, 0, 0], [-1, 0, 0, 0]], np.float32)) == [True, True]
    fresh = generator.normal([5, 0, 0, 0], 0.5, (2000, 4)).astype(np.float32)
    assert np.mean(novelty.find(fresh)) == pytest.approx(0.1, abs=0.05)
    assert novelty.find(np.full((1, 4), np.nan, np.float32)) == [True]


def test_a_bundle_without_a_usable_reference_has_nothing_novel(bundle_dir: Path) -> None:
    predictor = Predictor.load(bundle_dir, threads=1)
    size = predictor.embedding_size
    for broken in ({"other": np.zeros(3)}, {"embedding_nd": np.zeros((NEIGHBOURS, size), np.float32)}):
        np.savez(bundle_dir / "reference.npz", **broken)
        assert Novelty.load(predictor, 0.99) is None
    (bundle_dir / "reference.npz").write_bytes(b"PK\x03\x04")
    assert Novelty.load(predictor, 0.99) is None
    (bundle_dir / "reference.npz").unlink()
    keeper = make_keeper(novel=0.99)
    assert keeper.choose(predictor, [0.1], np.ones((1, size), np.float32), 0.0) == [Choice(False, 0.0, None)]


def test_a_novel_image_is_kept_with_its_reason(bundle_dir: Path) -> None:
    predictor = Predictor.load(bundle_dir, threads=1)
    reference = np.abs(np.random.default_rng(1).normal(1, 0.1, (50, predictor.embedding_size))).astype(np.float32)
    np.savez(bundle_dir / "reference.npz", embedding_nd=reference)
    seal_bundle(bundle_dir)
    predictor = Predictor.load(bundle_dir, threads=1)
    embedding_nd = np.stack([reference[0], -reference[0]])
    choices = make_keeper(novel=0.95).choose(predictor, [1.0, 1.0], embedding_nd, 0.0)
    assert choices == [Choice(False, 0.0, None), Choice(True, 1.0, "novel")]
