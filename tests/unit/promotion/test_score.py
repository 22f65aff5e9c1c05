"""Scores: from the original bytes, computed once, and aligned by class name."""

import io
from importlib.metadata import version

import numpy as np
import pytest

from visionloop.data.manifest import make_image_key
from visionloop.errors import DatasetError
from visionloop.evaluation.slices import measure_images
from visionloop.predictor import Predictor
from visionloop.promotion import score
from visionloop.promotion.score import (
    Scores,
    compute_engine_digest,
    compute_test_digest,
    map_scores,
    score_bundle,
    select_test,
    to_sets,
)
from visionloop.records import ImageRecord
from worlds import GOOD, POOR, make_label_facts, make_world, write_bundle


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("score"))


@pytest.fixture
def predictor(world, tmp_path):
    write_bundle(tmp_path / "bundle", world.pin, GOOD)
    return Predictor.load(tmp_path / "bundle", threads=1)


@pytest.fixture
def score_key(world, predictor):
    test_digest = compute_test_digest(select_test(world.records))
    key = f"scores/{predictor.digest}/{test_digest}-{compute_engine_digest()[:12]}.npz"
    world.store.delete(key)
    return key


def test_scores_are_the_served_answers_in_the_order_of_sha256(world, predictor, score_key):
    tests = select_test(world.records)
    assert len(tests) == 80
    assert [r.sha256 for r in tests] == sorted(r.sha256 for r in world.records if r.side == "test")
    scores = score_bundle(world.store, predictor, tests)
    served = predictor.predict([world.store.get(make_image_key(r.sha256)) for r in tests])
    assert [scores.classes[k] for k in scores.chosen] == [p.prediction for p in served]
    np.testing.assert_allclose(scores.probs_nk.max(axis=1), [p.confidence for p in served], atol=1e-5)


def test_brightness_and_sharpness_come_with_the_answers_and_from_the_cache(world, predictor, score_key):
    tests = select_test(world.records)
    images = [predictor.decode(world.store.get(make_image_key(r.sha256)), r.sha256) for r in tests]
    wanted = measure_images(np.stack(images))
    for scores in (score_bundle(world.store, predictor, tests), score_bundle(world.store, predictor, tests)):
        assert list(scores.measures) == ["brightness", "sharpness"]
        for name, values_n in scores.measures.items():
            np.testing.assert_allclose(values_n, wanted[name], rtol=1e-5)


def test_scores_are_computed_once(world, predictor, score_key):
    tests, progress = select_test(world.records), []
    first = score_bundle(world.store, predictor, tests, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(64, 80), (80, 80)]
    again = score_bundle(world.store, predictor, tests, on_progress=lambda done, total: progress.append("again"))
    assert progress == [(64, 80), (80, 80)]
    np.testing.assert_array_equal(again.probs_nk, first.probs_nk)
    np.testing.assert_array_equal(again.chosen, first.chosen)


def test_scores_of_another_runtime_are_computed_again(world, predictor, score_key, monkeypatch):
    tests, progress = select_test(world.records), []
    score_bundle(world.store, predictor, tests)
    before = compute_engine_digest()
    monkeypatch.setattr(score, "version", lambda name: "9.9" if name == "onnxruntime" else version(name))
    monkeypatch.setattr(score, "compute_engine_digest", compute_engine_digest.__wrapped__)
    assert score.compute_engine_digest() != before
    score_bundle(world.store, predictor, tests, on_progress=lambda done, total: progress.append(done))
    assert progress == [64, 80]
    monkeypatch.setattr(score, "version", version)
    assert score.compute_engine_digest() == before
    monkeypatch.setattr(score, "compute_module_digest", lambda module: "other code")
    assert score.compute_engine_digest() != before


def test_cached_scores_that_are_no_numbers_are_not_believed(world, predictor, score_key):
    tests = select_test(world.records)
    first = score_bundle(world.store, predictor, tests)
    bad_nk = first.probs_nk.copy()
    bad_nk[0] = np.nan
    sink = io.BytesIO()
    np.savez(sink, probs=bad_nk, chosen=first.chosen, abstained=np.zeros(80, bool))
    world.store.put(score_key, sink.getvalue())
    np.testing.assert_array_equal(score_bundle(world.store, predictor, tests).probs_nk, first.probs_nk)


@pytest.mark.parametrize("data", [b"", b"PK not a zip", b"PK\x03\x04" + bytes(50)])
def test_damaged_scores_are_computed_again(world, predictor, score_key, data):
    tests = select_test(world.records)
    first = score_bundle(world.store, predictor, tests)
    good = world.store.get(score_key)
    world.store.put(score_key, data)
    np.testing.assert_array_equal(score_bundle(world.store, predictor, tests).chosen, first.chosen)
    assert world.store.get(score_key) == good


def test_a_missing_image_is_named(world, predictor):
    lost = ImageRecord.from_json({**world.records[0].to_json(), "sha256": "e" * 64, "side": "test"})
    with pytest.raises(DatasetError, match="test image eeeeeeeeeeee: is not in the store"):
        score_bundle(world.store, predictor, [lost])


def test_test_digest_follows_images_and_labels_not_their_order(world):
    tests = select_test(world.records)
    relabelled = [ImageRecord.from_json({**tests[0].to_json(), "labels": ["z"]}), *tests[1:]]
    digest = compute_test_digest(tests)
    assert compute_test_digest(tests[::-1]) == digest
    assert compute_test_digest(relabelled) != digest
    assert compute_test_digest(tests[1:]) != digest


def test_unlabelled_images_are_no_test_unless_they_are_negatives():
    facts = {"sources": (), "origins": (), "ordinal": 0, "group": None, "key": "", "captured_at": None, "width": 1}
    facts |= {"height": 1, "format": "PNG", "num_bytes": 1, "phash": ""}
    records = [
        ImageRecord(sha256=sha, labels=labels, side=side, **facts)
        for sha, labels, side in (
            ("b", ("x",), "test"),
            ("a", (), "test"),
            ("c", ("x",), "train"),
            ("0", ("y",), "test"),
        )
    ]
    assert [r.sha256 for r in select_test(records)] == ["0", "b"]
    assert [r.sha256 for r in select_test(records, with_negatives=True)] == ["0", "a", "b"]


def test_classes_are_matched_by_name():
    scores = Scores(("a", "b"), np.array([[0.9, 0.1], [0.3, 0.7]], np.float32), np.array([0, 1]))
    mapped = map_scores(scores, ("c", "b", "a"))
    np.testing.assert_allclose(mapped.probs_nk, [[0, 0.1, 0.9], [0, 0.7, 0.3]], rtol=1e-6)
    assert mapped.chosen.tolist() == [2, 1]


def test_sets_of_labels_are_matched_by_name():
    several = Scores(("a", "b"), np.array([[0.9, 0.6], [0.3, 0.1]], np.float32), np.array([[1, 1], [0, 0]], bool))
    mapped = map_scores(several, ("c", "b", "a"))
    np.testing.assert_allclose(mapped.probs_nk, [[0, 0.6, 0.9], [0, 0.1, 0.3]], rtol=1e-6)
    assert mapped.chosen.tolist() == [[False, True, True], [False, False, False]]
    assert to_sets(mapped) is mapped
    single = Scores(("a", "b"), several.probs_nk, np.array([0, 1]))
    assert to_sets(map_scores(single, ("c", "b", "a"))).chosen.tolist() == [[False, False, True], [False, True, False]]


def test_sets_are_cached_as_sets(world, tmp_path):
    write_bundle(tmp_path / "several", world.pin, GOOD, **make_label_facts(world.pin.classes))
    predictor = Predictor.load(tmp_path / "several", threads=1)
    tests = select_test(world.records)
    first = score_bundle(world.store, predictor, tests)
    assert (first.chosen.shape, first.chosen.dtype) == ((80, 3), bool)
    again = score_bundle(
        world.store, predictor, tests, on_progress=lambda done, total: pytest.fail("not from the cache")
    )
    np.testing.assert_array_equal(again.chosen, first.chosen)
    np.testing.assert_array_equal(first.chosen, first.probs_nk >= 0.5)


def test_each_model_uses_its_own_card(world, tmp_path):
    tests = select_test(world.records)
    answers = []
    for number, card in enumerate([{}, {"resize": "letterbox"}, {"temperature": 4.0}]):
        write_bundle(tmp_path / str(number), world.pin, POOR, **card)
        answers.append(score_bundle(world.store, Predictor.load(tmp_path / str(number), threads=1), tests))
    np.testing.assert_array_equal(answers[0].chosen, answers[1].chosen)
    assert answers[2].probs_nk.max() < answers[0].probs_nk.max()
