"""What a video shows when: flickers go, changes stay, and nothing of the time is lost."""

from dataclasses import replace

import numpy as np
import pytest

from fakes import make_card
from visionloop.video.timeline import Follower, PathFinder, Timeline, make_timeline


def find_path(probs_tk: np.ndarray, seconds_t: np.ndarray, smooth_s: float) -> np.ndarray:
    finder = PathFinder(smooth_s)
    for probs_k, seconds in zip(probs_tk, seconds_t, strict=True):
        finder.add(probs_k, float(seconds))
    return np.array(finder.finish())


def follow(p_t: list[float], smooth_s: float, seconds: float = 1.0) -> str:
    """Return a letter a frame: d where the path has the second class."""
    p = np.array(p_t)
    path = find_path(np.column_stack([p, 1 - p]), np.full(len(p), seconds), smooth_s)
    return "".join("cd"[k] for k in path)


def make(
    rows: list[list[float]], *, task: str = "multiclass", doubts: list[str | None] | None = None, **more: float
) -> Timeline:
    probs = np.array(rows, np.float32)
    card = make_card(tuple("abc"[: probs.shape[1]]), task=task)
    times = [0.5 * number for number in range(len(rows))]
    wishes = {"every_s": 0.5, "smooth_s": 1.0, **more}
    return make_timeline(times, probs, doubts or [None] * len(rows), card, **wishes)


def test_the_worked_example() -> None:
    assert follow([0.9, 0.9, 0.02, 0.9, 0.9, 0.9], 1.5) == "cccccc"
    assert follow([0.9, 0.9, 0.02, 0.02, 0.9, 0.9], 1.5) == "ccddcc"


@pytest.mark.parametrize("seconds", [0.1, 0.5, 2.0])
def test_a_change_is_believed_from_smooth_s_on_however_often_frames_are_taken(seconds: float) -> None:
    for number in (1, 2, 3, 5, 6, 7, 8):
        path = follow([1.0] * 10 + [0.0] * number + [1.0] * 10, 4 * seconds, seconds)
        assert path.count("d") == (number if number > 4 else 0), number


def test_without_smoothing_each_frame_speaks_for_itself() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(120), 50)
    assert find_path(p, np.full(50, 0.5), 0.0).tolist() == p.argmax(axis=1).tolist()


def test_the_path_is_the_cheapest_of_all() -> None:
    rng, price = np.random.default_rng(1), 0.75 * np.log(0.98 / 0.02)
    for _ in range(30):
        probs, seconds = rng.dirichlet(np.ones(3), 5), rng.uniform(0.2, 2, 5)

        def cost(path: np.ndarray, probs: np.ndarray = probs, seconds: np.ndarray = seconds) -> float:
            own = -seconds * np.log(np.clip(probs[np.arange(5), path], 0.02, 0.98))
            return float(own.sum() + price * (np.diff(path) != 0).sum())

        every = np.stack(np.meshgrid(*[range(3)] * 5), -1).reshape(-1, 5)
        assert cost(find_path(probs, seconds, 1.5)) == pytest.approx(min(map(cost, every)), abs=1e-6)


def test_segments_follow_each_other_and_the_answer_is_what_is_seen_longest() -> None:
    found = make([[0.8, 0.1, 0.1]] * 6 + [[0.1, 0.85, 0.05]] * 10 + [[0.0, 0.1, 0.9]] * 4)
    assert [(s.start_s, s.end_s, s.prediction, s.num_frames) for s in found.segments] == [
        (0.0, 3.0, "a", 6),
        (3.0, 8.0, "b", 10),
        (8.0, 10.0, "c", 4),
    ]
    assert found.segments[1].confidence == pytest.approx(0.85)
    assert (found.prediction, found.abstained, found.labels) == ("b", None, None)
    assert found.confidence == pytest.approx(0.85)
    assert list(found.shares.items()) == [("b", 0.5), ("a", pytest.approx(0.3)), ("c", pytest.approx(0.2))]


def test_a_stretch_that_it_does_not_know_is_a_segment_of_its_own() -> None:
    doubts = [None] * 6 + ["confidence 0.50 < 0.70"] * 4 + [None] * 6
    found = make([[0.9, 0.05, 0.05]] * 16, doubts=doubts)
    assert [(s.start_s, s.end_s, s.abstained) for s in found.segments] == [
        (0.0, 3.0, None),
        (3.0, 5.0, "confidence 0.50 < 0.70"),
        (5.0, 8.0, None),
    ]
    assert (found.prediction, found.abstained) == ("a", None)
    assert found.shares == {"a": pytest.approx(0.75)}
    lone = make([[0.9, 0.05, 0.05]] * 5, doubts=[None, None, "why", None, None])
    assert [s.abstained for s in lone.segments] == [None], "one frame of five is a flicker"


def test_a_video_that_it_does_not_know_says_so_and_guesses() -> None:
    found = make([[0.6, 0.3, 0.1]] * 8, doubts=["why"] * 6 + [None] * 2, smooth_s=0.0)
    assert found.prediction == "a"
    assert found.abstained == "it does not know for 75% of the time: why"
    assert found.shares == {"a": 0.25}


def test_several_labels_each_have_their_own_path() -> None:
    found = make([[0.9, 0.1, 0.2]] * 6 + [[0.9, 0.8, 0.2]] * 6, task="multilabel")
    assert [s.labels for s in found.segments] == [("a",), ("a", "b")]
    assert found.segments[1].prediction == "a|b"
    assert found.segments[1].confidence == pytest.approx(0.9 * 0.8 * 0.8)
    assert (found.labels, found.prediction) == (("a", "b"), "a|b")
    assert found.shares == {"a": 1.0, "b": 0.5}
    nothing = make([[0.1, 0.1, 0.2]] * 4, task="multilabel")
    assert (nothing.labels, nothing.prediction, nothing.shares) == ((), "", {})


def test_a_threshold_decides_as_for_one_image() -> None:
    card = make_card(("a", "b"))
    probs = np.array([[0.4, 0.6]] * 6, np.float32)
    for threshold, name in ((0.5, "b"), (0.7, "a")):
        found = make_timeline(range(6), probs, [None] * 6, replace(card, threshold=threshold), every_s=1, smooth_s=1)
        assert [s.prediction for s in found.segments] == [name]
    assert found.confidence == pytest.approx(0.4)


def test_one_frame_is_a_video() -> None:
    found = make([[0.2, 0.7, 0.1]], every_s=0.25)
    assert [(s.start_s, s.end_s, s.prediction) for s in found.segments] == [(0.0, 0.25, "b")]


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_frames_one_by_one_give_the_segments_of_all_at_once(task: str) -> None:
    """Whatever is settled early is what the whole film says."""
    rng = np.random.default_rng(4)
    classes = ("a", "b") if task == "binary" else ("a", "b", "c")
    card, num_early = make_card(classes, task=task), 0
    for _ in range(20):
        times = np.cumsum(rng.uniform(0.1, 0.9, 60)).tolist()
        probs = np.repeat(rng.dirichlet(np.full(len(classes), 0.3), 15), 4, axis=0)
        doubts = [None if sure else "why" for sure in np.repeat(rng.random(15) < 0.7, 4)]
        whole = make_timeline(times, probs, doubts, card, every_s=0.5, smooth_s=1.0).segments
        follower, found, early = Follower(card, 1.0, most_waiting=10_000), [], []
        for time, seconds, probs_k, doubt in zip(times, np.diff([*times, times[-1] + 0.5]), probs, doubts, strict=True):
            found += follower.add(time, float(seconds), probs_k, doubt)
            early += [follower.current] if follower.current else []
        num_early += len(found)
        assert tuple(found + follower.finish()) == whole
        starts = {one.start_s: one.prediction for one in whole}
        assert all(starts[one.start_s] == one.prediction for one in early)
    assert num_early > 20, "most were settled long before the end"


def test_a_sure_change_is_settled_soon_and_nothing_waits_for_ever() -> None:
    follower = Follower(make_card(), 1.0, most_waiting=12)
    sure = {"a": np.array([0.98, 0.01, 0.01]), "b": np.array([0.01, 0.98, 0.01])}
    for number in range(20):
        follower.add(0.5 * number, 0.5, sure["a" if number < 10 else "b"], None)
        if number == 9 + 3:  # three frames are 1.5 s of it: more than smooth_s
            assert follower.current and (follower.current.prediction, follower.current.start_s) == ("b", 5.0)
        elif number == 9 + 2:
            assert follower.current and follower.current.prediction == "a"
    for number in range(20, 60):
        follower.add(0.5 * number, 0.5, np.array([0.45, 0.45, 0.1]), None)
        assert len(follower._waiting) <= 12
    assert sum(one.num_frames for one in follower.finish()) == 50, "each frame once; ten were returned before"
