"""One test over many detectors: its level, and that it sees what it should."""

from dataclasses import replace

import numpy as np
import pytest

from traffic import Network, blur, cast, change_camera, make_window
from visionloop.monitoring.drift import MAX_WINDOW_BLOCKS, Basis, Drift, Sample, combine, find_drift, keep_one_each

DRIFTS = {
    "blur": {"change": blur},
    "colour cast": {"change": cast},
    "new class": {"new_share": 0.25},
    "new camera": {"change": change_camera},
}


@pytest.fixture(scope="module")
def network() -> Network:
    return Network()


def make_vectors(rng: np.random.Generator, number: int, block: int, *, d: int = 8, shift: float = 0.0) -> Sample:
    """Return embeddings of which those of one block share half of their variance, and answers that follow them."""
    block_n = np.arange(number) // block
    embedding_nd = rng.normal(size=(number, d))
    if block > 1:
        embedding_nd = np.sqrt(0.5) * (embedding_nd + rng.normal(size=(block_n.max() + 1, d))[block_n])
    embedding_nd = embedding_nd + shift
    probs_nk = np.exp(embedding_nd[:, :3])
    confidence_n = probs_nk.max(axis=1) / probs_nk.sum(axis=1)
    return Sample(
        block_n,
        np.eye(3, dtype=bool)[probs_nk.argmax(axis=1)],
        confidence_n,
        confidence_n < 0.45,
        embedding_nd,
        {"brightness": embedding_nd[:, 3]},
    )


def count_alarms(block: int, windows: int, level: float, *, seed: int, each: int = 20) -> int:
    """Return how many windows of 200 images like the reference give an alarm. A reference serves for `each` of them."""
    rng, found = np.random.default_rng(seed), 0
    for number in range(windows):
        if number % each == 0:
            basis = Basis.fit(make_vectors(rng, 300, 1).embedding_nd)
            reference = make_vectors(rng, 1000, block)
        found += find_drift(reference, make_vectors(rng, 200, block), basis, level, seed=number).found
    return found


@pytest.mark.parametrize("block", [8, 16])
def test_false_alarms_are_as_rare_as_asked(block: int) -> None:
    # 5 % of 80 are 4, with a standard deviation of 2.
    assert 1 <= count_alarms(block, 80, 0.05, seed=block) <= 10


def test_blocks_count_and_not_their_images() -> None:
    """Taken for images by themselves, the same windows of alike frames would be called drifted nearly always."""
    rng = np.random.default_rng(0)
    basis = Basis.fit(make_vectors(rng, 300, 1).embedding_nd)
    reference = make_vectors(rng, 1000, 16)
    windows = [make_vectors(rng, 200, 16) for _ in range(10)]

    def split(sample: Sample) -> Sample:
        return replace(sample.take(rng.permutation(len(sample))), block_n=np.arange(len(sample)))

    assert sum(find_drift(split(reference), split(window), basis, 0.01).found for window in windows) >= 8
    assert sum(find_drift(reference, window, basis, 0.01).found for window in windows) <= 1


@pytest.mark.long
@pytest.mark.parametrize("block", [1, 16])
def test_false_alarms_of_500_windows_at_one_in_100(block: int) -> None:
    """Each with a reference of its own: windows that share one have their false alarms in groups."""
    assert 0.003 <= count_alarms(block, 500, 0.01, seed=block, each=1) / 500 <= 0.02


@pytest.mark.parametrize("what", DRIFTS)
def test_drift_is_found(network: Network, what: str) -> None:
    rng = np.random.default_rng(7)
    reference = make_window(network, rng, 800, 16)
    found = [
        find_drift(reference, make_window(network, rng, 200, 16, **DRIFTS[what]), network.basis, 0.01) for _ in range(2)
    ]
    assert any(one.found for one in found)
    assert {"classifier", "mmd"} & {d.name for one in found for d in one.detectors if d.alarmed}


@pytest.mark.long
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("what", DRIFTS)
def test_drift_is_found_within_three_windows_of_200(network: Network, what: str, block: int) -> None:
    rng, found = np.random.default_rng(3), 0
    for number in range(40):
        if number % 10 == 0:
            reference = make_window(network, rng, 1000, block)
        windows = (make_window(network, rng, 200, block, **DRIFTS[what]) for _ in range(3))
        found += any(find_drift(reference, one, network.basis, 0.01, seed=number).found for one in windows)
    assert found >= 38


def test_detectors_name_what_changed(network: Network) -> None:
    rng = np.random.default_rng(1)
    reference, window = make_window(network, rng, 800, 8), make_window(network, rng, 200, 8)
    darker = replace(window, quality={**window.quality, "brightness": window.quality["brightness"] - 0.2})
    drift = find_drift(reference, darker, network.basis, 0.01)
    assert [one.name for one in drift.detectors if one.alarmed] == ["brightness"]
    brightness = next(one for one in drift.detectors if one.name == "brightness")
    assert brightness.value > brightness.limit
    assert brightness.p <= 0.01
    unsure = replace(window, abstained_n=np.arange(200) % 2 == 0)
    assert "abstained" in {d.name for d in find_drift(reference, unsure, network.basis, 0.01).detectors if d.alarmed}


def test_classifier_is_scored_on_blocks_that_it_has_not_seen() -> None:
    """On windows without drift its score is around 0. On what it was fitted on, it would be 6 and more."""
    rng = np.random.default_rng(2)
    basis = Basis.fit(make_vectors(rng, 300, 1, d=24).embedding_nd)
    drifts = [
        find_drift(make_vectors(rng, 400, 8, d=24), make_vectors(rng, 200, 8, d=24), basis, 0.01) for _ in range(10)
    ]
    scores = [one.value for drift in drifts for one in drift.detectors if one.name == "classifier"]
    assert len(scores) == 10
    assert abs(np.mean(scores)) < 2
    moved = find_drift(make_vectors(rng, 400, 8, d=24), make_vectors(rng, 200, 8, d=24, shift=1.0), basis, 0.01)
    assert next(one for one in moved.detectors if one.name == "classifier").alarmed


def test_few_blocks_cannot_show_drift() -> None:
    """The example of the docstring: 9 blocks, and 1 that is further away than each of them."""
    rng = np.random.default_rng(0)
    reference, window = make_vectors(rng, 90, 10), make_vectors(rng, 10, 10, shift=50)
    drift = find_drift(reference, window, Basis.fit(rng.normal(size=(100, 8))), 0.01)
    assert drift.num_blocks == (9, 1)
    assert drift.floor == pytest.approx(0.1)
    assert not drift.can_tell
    assert not drift.found
    assert 0.1 <= drift.p < 0.3  # other blocks lead by other detectors
    assert "classifier" not in {one.name for one in drift.detectors}  # nothing is held out of one block


def test_combine_takes_the_smallest_share_against_the_smallest_shares() -> None:
    """4 rows, 2 detectors. The real row leads the first: 1/4. Row 1 leads the second: 1/4 too. Two of four: p = 1/2."""
    values = np.array([[9.0, 1.0], [1.0, 9.0], [2.0, 3.0], [3.0, 2.0]])
    p, adjusted_j, _ = combine(values, 0.3)
    assert p == 0.5
    assert adjusted_j.tolist() == [0.5, 1.0]
    clear = np.column_stack([np.r_[100.0, np.arange(99)], np.r_[10.0, np.arange(99)[::-1] / 20]])
    p, adjusted_j, limit_j = combine(clear, 0.05)
    assert p == 0.01
    assert (adjusted_j <= 0.05).all()
    assert limit_j[0] < 99


def test_no_detector_has_a_smaller_p_than_all_together_and_one_has_the_same() -> None:
    """Also where another deal has the same smallest share: by what is left, or because values are equal."""
    twice = np.array([[9.0, 8.0], [1.0, 9.0], [2.0, 3.0], [3.0, 2.0]])  # rows 0 and 1 lead one each; 0 is second, too
    p, adjusted_j, _ = combine(twice, 0.3)
    assert (p, adjusted_j.tolist()) == (0.25, [0.25, 0.75])
    equal = np.array([[9.0, 8.0], [9.0, 1.0], [2.0, 3.0], [3.0, 2.0]])  # two of four rows have 9
    assert combine(equal, 0.3)[0] == 0.25  # by its second detector
    assert combine(equal[:, :1], 0.3)[0] == 0.5
    rng = np.random.default_rng(0)
    for number in range(300):
        values = rng.integers(0, 2 + number, (int(rng.integers(2, 60)), int(rng.integers(1, 9)))).astype(float)
        p, adjusted_j, _ = combine(values, 0.05)
        assert p == adjusted_j.min()
        assert p >= (values >= values[0]).mean(axis=0).min()


def test_p_is_no_smaller_than_so_few_blocks_allow() -> None:
    rng = np.random.default_rng(0)
    drifts = [find_drift(make_vectors(rng, 90, 30), make_vectors(rng, 30, 30), None, 0.3, seed=n) for n in range(20)]
    assert {drift.floor for drift in drifts} == {0.25}
    assert all(drift.p == min(one.p for one in drift.detectors) >= 0.25 for drift in drifts)


def test_more_blocks_than_are_needed_are_put_together() -> None:
    rng = np.random.default_rng(0)
    drift = find_drift(make_vectors(rng, 600, 1), make_vectors(rng, 200, 1), None, 0.01)
    assert (drift.num_blocks, drift.together) == ((150, MAX_WINDOW_BLOCKS), 4)
    assert {one.name for one in drift.detectors} == {"classes", "abstained", "confidence", "brightness"}


def test_what_says_nothing_gives_no_alarm() -> None:
    """Constant columns, unknown measures, embeddings that are all the same."""
    rng = np.random.default_rng(0)
    same = Sample(
        np.arange(60) // 4,
        np.ones((60, 2), bool),
        np.ones(60),
        np.zeros(60, bool),
        np.ones((60, 5)),
        {"brightness": np.full(60, np.nan), "contrast": np.zeros(60)},
    )
    drift = find_drift(same, same.take(np.arange(24)), Basis.fit(np.ones((20, 5))), 0.05)
    assert isinstance(drift, Drift)
    assert drift.p == 1.0
    half = replace(make_vectors(rng, 200, 4), quality={"brightness": np.where(np.arange(200) % 2, np.nan, 0.5)})
    none = replace(make_vectors(rng, 100, 4), quality={"brightness": np.full(100, np.nan)})
    alarmed = [one.name for one in find_drift(half, none, None, 0.01).detectors if one.alarmed]
    assert alarmed == ["brightness"]  # that a measure is missing now is a change


def test_axes_see_what_the_basis_did_not_know() -> None:
    """A direction in which the images of the basis never differed: only the length of the rest tells it."""
    rng = np.random.default_rng(0)
    flat = np.column_stack([rng.normal(size=(300, 3)), np.zeros((300, 40))])
    basis = Basis.fit(flat + rng.normal(0, 0.01, flat.shape))
    moved = flat[:1].repeat(2, axis=0)
    moved[1, 10] = 3.0
    assert basis.project(moved)[1, -1] > basis.project(moved)[0, -1] + 5


def test_one_image_of_each_block_is_kept() -> None:
    sample = make_vectors(np.random.default_rng(0), 100, 7)
    one = keep_one_each(sample, seed=3)
    assert one.block_n.tolist() == list(range(15))
    assert one.embedding_nd is not None
    assert all(row in sample.embedding_nd for row in one.embedding_nd)
