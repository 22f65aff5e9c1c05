"""Places in the plane, the page of the map, and which labels are suspected. No images, no network."""

import csv
import io
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_embedding_table import make_prepared

from visionloop.errors import DatasetError, TrainingError
from visionloop.features.map import choose_rows, fill_page, project
from visionloop.features.neighbours import compute_votes_of_others, find_other_neighbours, to_targets
from visionloop.features.suspects import Suspect, encode_corrections, find_suspects, judge_labels, judge_several

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!--"
CLUSTERS = np.random.default_rng(0).normal(size=(3, 20))


def make_vectors(number: int) -> Any:
    rng = np.random.default_rng(1)
    label_n = np.arange(number) % 3
    return (CLUSTERS[label_n] + rng.normal(0, 0.05, (number, 20))).astype(np.float32), label_n


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_places_keep_clusters_apart_and_are_the_same_again(method: Any) -> None:
    vectors, label_n = make_vectors(60)
    place_n2, words = project(vectors, method)
    assert words == {"pca": "principal components", "tsne": "t-SNE"}[method]
    assert np.abs(place_n2).max() == pytest.approx(1.0, abs=1e-6)
    centres = np.stack([place_n2[label_n == k].mean(axis=0) for k in range(3)])
    nearest = np.linalg.norm(place_n2[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == label_n).all()
    np.testing.assert_array_equal(project(vectors, method)[0], place_n2)


def test_of_many_images_the_others_lie_among_their_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.features.map.MAX_TSNE", 45)
    vectors, label_n = make_vectors(150)
    place_n2, words = project(vectors, "auto")
    assert words == "t-SNE of 45 images, the other 105 among their nearest of these"
    centres = np.stack([place_n2[label_n == k].mean(axis=0) for k in range(3)])
    nearest = np.linalg.norm(place_n2[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == label_n).all()


@pytest.mark.parametrize("number", [1, 2, 5, 9])
def test_few_or_equal_images_have_a_place(number: int) -> None:
    for vectors in (make_vectors(number)[0], np.ones((number, 4), np.float32), np.zeros((number, 1), np.float32)):
        place_n2, _ = project(vectors)
        assert place_n2.shape == (number, 2)
        assert np.isfinite(place_n2).all()
    with pytest.raises(DatasetError, match="are not finite"):
        project(np.full((number, 4), np.nan, np.float32))


def test_hostile_names_stay_data() -> None:
    page = fill_page(HOSTILE, {"classes": [HOSTILE], "origins": ["__DATA__ __TITLE__"]})
    assert "<img" not in page
    assert page.count("</script>") == 2, "one for the data, one for the code"
    assert "&lt;/script&gt;" in page.split("</title>")[0]
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    assert json.loads(found.group(1)) == {"classes": [HOSTILE], "origins": ["__DATA__ __TITLE__"]}


def test_thumbnails_are_spread_and_no_more_than_there_are() -> None:
    assert choose_rows(5, 100).tolist() == [0, 1, 2, 3, 4]
    assert choose_rows(101, 3).tolist() == [0, 50, 100]
    assert choose_rows(10, 0).tolist() == []


def test_a_label_is_suspected_by_the_margin_of_the_votes() -> None:
    votes_nc = np.array([[0.1, 0.9, 0.0], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5]])
    found = judge_labels(votes_nc, np.array([0, 0, 1]), ("a", "b", "c"))
    assert found == [Suspect(0, "a", "b", 0.8), Suspect(2, "b", "c", 0.2)]
    assert judge_labels(np.ones((2, 1)), np.array([0, 0]), ("a",)) == []


def test_of_several_labels_each_is_judged_and_at_most_one_is_added() -> None:
    target_nc = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], np.uint8)
    votes_nc = np.array([[0.2, 0.9, 0.8], [0.9, 0.8, 0.1], [0.4, 0.0, 0.5]])
    found = judge_several(votes_nc, target_nc, ("a", "b", "c"))
    assert found == [Suspect(0, "a", "", 0.6), Suspect(0, "", "b", 0.8)]


def test_corrections_are_read_back_and_no_name_is_a_formula(tmp_path: Any) -> None:
    prepared = make_prepared(tmp_path)
    origins = {0: '=HYPERLINK("x")', 1: 'photos:a "b", c.png'}
    album: Any = SimpleNamespace(
        prepared=prepared, records=[SimpleNamespace(side="train")] * 40, get_origin=lambda row: origins[row]
    )
    text = encode_corrections(album, [Suspect(0, "a, b", "c", 0.5), Suspect(1, "", "d", 0.25)])
    path = tmp_path / "corrections.csv"
    path.write_bytes(text.encode())
    from visionloop.ingest.labels import load_corrections

    assert [(c.sha256, c.old, c.new) for c in load_corrections(path)] == [
        (prepared.sha256_n[0], "a, b", "c"),
        (prepared.sha256_n[1], "", "d"),
    ]
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["origin"] for row in rows] == ['\'=HYPERLINK("x")', 'photos:a "b", c.png']


def make_album(vectors: Any, label_n: Any) -> Any:
    classes = tuple("abcdefgh"[: label_n.max() + 1])
    prepared = SimpleNamespace(
        targets_nk=None, label_n=label_n, classes=classes, sha256_n=[f"{i:064x}" for i in range(len(label_n))]
    )
    encoder = SimpleNamespace(
        facts=SimpleNamespace(source="params", weights="none", describe=lambda: "small_cnn at 32 x 32")
    )
    target_nc = to_targets(label_n, len(classes))
    return SimpleNamespace(prepared=prepared, embedding_nd=vectors, target_nc=target_nc, encoder=encoder)


def test_wrong_labels_come_first_on_vectors_like_those_of_cats_and_dogs() -> None:
    """Two clusters that overlap as cats and dogs do in a pretrained network: 98.5 % of the images near their own."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        true_n = np.arange(1200) % 2
        vectors = (np.eye(64)[true_n] * 9 + rng.normal(0, 2.8, (1200, 64))).astype(np.float32)
        votes_nc = compute_votes_of_others(*find_other_neighbours(vectors, 10), to_targets(true_n, 2))
        assert (votes_nc.argmax(axis=1) == true_n).mean() == pytest.approx(0.985, abs=0.006)
        wrong = rng.choice(1200, 60, replace=False)
        label_n = true_n.copy()
        label_n[wrong] = 1 - label_n[wrong]
        found, agreement = find_suspects(make_album(vectors, label_n))
        assert len({s.row for s in found[:120]} & set(wrong.tolist())) >= 0.9 * 60
        assert agreement is not None
        assert not agreement.is_weak
        assert all(suspect.new == "ab"[true_n[suspect.row]] for suspect in found[:30])


def test_an_encoder_that_cannot_tell_the_classes_doubts_nothing() -> None:
    rng = np.random.default_rng(0)
    album = make_album(rng.normal(size=(300, 16)).astype(np.float32), rng.integers(0, 2, 300))
    with pytest.raises(TrainingError) as caught:
        find_suspects(album)
    words = str(caught.value)
    assert words.startswith(
        "encoder small_cnn at 32 x 32: cannot tell the classes: neighbours agree with the labels in "
    )
    assert "Use pretrained weights: `backbone: efficientnet_lite0` and `weights: default`" in words
    album.encoder.facts.weights = "default"
    with pytest.raises(TrainingError, match=r"Use another train.backbone, or a trained model: `--encoder candidate`"):
        find_suspects(album)


def test_a_weak_encoder_is_used_and_says_so() -> None:
    rng = np.random.default_rng(0)
    label_n = np.arange(400) % 2
    found, agreement = find_suspects(
        make_album((label_n[:, None] + rng.normal(size=(400, 4))).astype(np.float32), label_n)
    )
    assert agreement is not None
    assert (agreement.p_value, agreement.is_weak) == (1 / 200, True)
    assert 0.55 < agreement.share < 0.75
    assert len(found) > 40


def test_votes_are_judged_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    label_n = np.arange(60) % 2
    vectors = (np.eye(8)[label_n] * 5 + np.random.default_rng(0).normal(size=(60, 8))).astype(np.float32)
    label_n[[3, 40]] = 1 - label_n[[3, 40]]
    album = make_album(vectors, label_n)
    whole = find_suspects(album)
    assert {suspect.row for suspect in whole[0]} >= {3, 40}
    monkeypatch.setattr("visionloop.features.suspects.BLOCK", 7)
    assert find_suspects(album) == whole
