"""When another engine may serve a model: the share of other answers by its bound, and what it costs in log loss."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fakes import make_bundle
from visionloop.bundle import load_bundle
from visionloop.errors import BundleError
from visionloop.evaluation import runtimes
from visionloop.evaluation.runtimes import (
    KeptOutputs,
    RuntimeCheck,
    describe_bound,
    describe_few,
    describe_runtimes,
    load_approved,
    open_runtime,
    try_engine,
)
from visionloop.networks import processor
from visionloop.predictor import INT8, Outputs, Predictor
from visionloop.training.engines import count_compared

MOST = 0.01


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    make_bundle(folder, engines=[INT8])
    return Predictor(load_bundle(folder), threads=1)


def make_check(predictor: Predictor, changed: int, images: int) -> RuntimeCheck:
    return RuntimeCheck(INT8, predictor, num_changed=changed, num_images=images)


def approve(changed_n: np.ndarray, images: int, predictor: Predictor) -> np.ndarray:
    known = {k: make_check(predictor, int(k), images).most_changed <= MOST for k in np.unique(changed_n)}
    return np.array([known[k] for k in changed_n])


def test_the_level_and_the_power_of_the_bound(predictor: Predictor) -> None:
    """An engine that changes more than 1 % passes in at most 5 % of all cases, however many images there are."""
    rng = np.random.default_rng(0)
    for images in (299, 473, 628, 1000):
        passed = approve(rng.binomial(images, 1.0001 * MOST, 20_000), images, predictor).mean()
        assert passed <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20_000), images
    shares = (0.001, 1 / 600, 0.003)
    power = [approve(rng.binomial(628, share, 20_000), 628, predictor).mean() for share in shares]
    assert power == pytest.approx([0.97, 0.91, 0.71], abs=0.01)


def test_enough_images_are_compared_for_any_wish() -> None:
    assert [count_compared(most) for most in (0.1, 0.01, 0.001)] == [61, 628, 6290]
    for most in (0.5, 0.1, 0.01, 0.001):
        assert describe_few(count_compared(most), most) == ""


def test_it_ends_where_no_further_image_could_help(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_n, step = np.arange(600), 50
    ours = predictor.run(np.zeros((step, 32, 32, 3), np.uint8))
    silent = replace(ours, abstained_n=np.arange(step) < 1)  # one of each batch is answered otherwise

    class Grey:
        def read(self, rows_n: np.ndarray) -> np.ndarray:
            return np.zeros((len(rows_n), 32, 32, 3), np.uint8)

    def look(outputs: Outputs, most: float) -> RuntimeCheck:
        return try_engine(INT8, predictor, Grey(), rows_n, [outputs] * 12, most=most)  # type: ignore[arg-type]

    stopped = look(silent, MOST)
    assert (stopped.num_changed, stopped.num_images) == (7, 350), "six of 1,200 might be, seven may not"
    assert stopped.most_changed > MOST
    assert (look(silent, 0.1).num_images, look(ours, MOST).num_images) == (600, 600)


def test_one_image_of_a_group_keeps_the_level_and_all_frames_would_not(predictor: Predictor) -> None:
    """Films of 50 frames that change together: a share of 1.5 % of all films."""
    rng = np.random.default_rng(1)
    changed_rk = rng.random((4_000, 400)) < 0.015
    one_of_each = approve(changed_rk.sum(axis=1), 400, predictor).mean()
    frames = approve(50 * changed_rk.sum(axis=1), 50 * 400, predictor).mean()
    assert one_of_each <= 0.01
    assert frames > 0.1, "as if frames were independent it would pass far too often"


@pytest.mark.parametrize(
    ("changed", "images", "passes"), [(0, 298, 0), (0, 299, 1), (1, 472, 0), (1, 473, 1), (4, 1000, 1)]
)
def test_so_many_other_answers_may_be_among_so_many(
    changed: int, images: int, passes: int, predictor: Predictor
) -> None:
    assert (make_check(predictor, changed, images).most_changed <= MOST) is bool(passes)


def test_too_few_images_are_told_with_how_many_more() -> None:
    assert describe_few(299, MOST) == ""
    assert describe_few(200, MOST) == (
        "200 images (one of a group) that it has not learned from; 299 must be answered alike to show that at most 1 % "
        "of the answers differ: 99 more are needed"
    )
    assert describe_few(0, 0.1).endswith("29 more are needed")


def test_what_is_told_of_a_bound(predictor: Predictor) -> None:
    passed = describe_bound(make_check(predictor, 1, 600), MOST)
    assert passed == "1 of 600 answers differ, at most 0.79 % with 95 %"
    unsure = make_check(predictor, 7, 64)
    unsure.num_doubted = 6
    assert describe_bound(unsure, MOST).startswith("7 of 64 answers differ (6 of them only in whether it knows: train.")
    near = describe_bound(make_check(predictor, 2, 500), MOST)
    assert near.startswith("2 of 500 answers differ, at most 1.3 % with 95 %; expected at most 1 %; with about ")
    number = int(near.split("about ")[1].split()[0].replace(",", ""))
    share = make_check(predictor, round(2 / 500 * (500 + number)), 500 + number)
    assert share.most_changed <= MOST
    assert describe_bound(make_check(predictor, 50, 500), MOST).endswith("expected at most 1 %"), "no number would do"


def test_dont_know_is_an_answer_and_an_answer_that_is_no_number_differs(predictor: Predictor) -> None:
    images = np.zeros((4, 32, 32, 3), np.uint8)
    same = predictor.run(images)
    check = make_check(predictor, 0, 0)
    check.compare(images, same, predictor)
    assert (check.num_changed, check.num_images, check.difference, check.cosine) == (0, 4, 0.0, pytest.approx(1.0))
    silent = Outputs(same.logits_nk, same.probs_nk, same.embedding_nd, np.array([True, False, False, True]))
    check.compare(images, silent, predictor)
    assert (check.num_changed, check.num_doubted, check.num_images) == (2, 2, 8)
    check.compare(
        images,
        Outputs(same.logits_nk, np.full_like(same.probs_nk, np.nan), same.embedding_nd, same.abstained_n),
        predictor,
    )
    assert check.difference == 1.0


def test_log_loss_may_rise_by_a_hundredth_and_else_the_classes_are_named(predictor: Predictor) -> None:
    truth = np.repeat([0, 1, 2], 20)
    ours = np.full((60, 3), 0.05)
    ours[np.arange(60), truth] = 0.9
    theirs = ours.copy()
    theirs[truth == 1] = [0.075, 0.85, 0.075]
    check = make_check(predictor, 0, 60)
    check.judge(theirs, ours, truth, ("a", "b", "c"))
    assert check.rise == pytest.approx(np.log(0.9 / 0.85) / 3)
    assert not check.is_approved
    assert check.class_rise["b"] == pytest.approx(np.log(0.9 / 0.85))
    (line,) = describe_runtimes([check])
    assert line == (
        "LOOK: onnxruntime int8 is not approved for this model: log loss is 0.019 higher, at most 0.01 may be; "
        "by class: b +0.057, a +0.000, c +0.000"
    )
    check.judge(ours, ours, truth, ("a", "b", "c"))
    assert check.is_approved
    check.judge(np.full_like(ours, np.nan), ours, truth, ("a", "b", "c"))
    assert not check.is_approved
    assert check.to_json()["log_loss_rise"] == 99.0


def test_log_loss_of_several_labels_is_the_mean_over_classes(predictor: Predictor) -> None:
    truth = np.array([[True, False], [True, True]])
    ours, theirs = np.full((2, 2), 0.5), np.array([[0.5, 0.75], [0.5, 0.5]])
    check = make_check(predictor, 0, 2)
    check.judge(theirs, ours, truth, ("a", "b"))
    assert check.rise == pytest.approx(np.log(2) / 4)
    assert check.class_rise == {"a": pytest.approx(np.log(2) / 4), "b": 0.0}


class Network:
    """A session that is opened for each check, and counts the images that it was run on."""

    def __init__(self) -> None:
        self.opened = self.run_on = 0

    def open(self) -> "Network":
        self.opened += 1
        return self

    def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        (images,) = inputs.values()
        self.run_on += len(images)
        return [images.mean(axis=(1, 2), dtype=np.float32) * (k + 1) for k in range(len(names))]


NAMES = ["logits", "embedding"]


def ask(folder: Path, *batches: np.ndarray, graph: bytes = b"graph") -> tuple[Network, list[np.ndarray], list[str]]:
    """Run batches by what is kept in a folder; return the network, the last outputs, and what was told."""
    network, lines = Network(), list[str]()
    kept = KeptOutputs(folder, lines.append)
    with kept.saving():
        session = kept.open(INT8, graph, network.open)
        outputs = [session.run(NAMES, {"images": batch}) for batch in batches]
    return network, outputs[-1], lines


def make_batch(seed: int, images: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (images, 4, 4, 3), dtype=np.uint8)


def test_what_an_engine_gave_is_kept_and_only_other_images_are_run(tmp_path: Path) -> None:
    first, given, lines = ask(tmp_path, make_batch(0), make_batch(1))
    assert (first.opened, first.run_on, lines) == (1, 6, [])
    again, taken, lines = ask(tmp_path, make_batch(0), make_batch(1))
    assert (again.opened, again.run_on, lines) == (0, 0, [])
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(given, taken, strict=True))
    more, _, _ = ask(tmp_path, make_batch(0), make_batch(2), make_batch(1, images=2))
    assert (more.opened, more.run_on) == (1, 5), "the same pixels in another batch may come out otherwise"
    assert ask(tmp_path, make_batch(0), make_batch(1), make_batch(2))[0].run_on == 0
    same_bytes = make_batch(0).reshape(1, 12, 4, 3)
    assert ask(tmp_path, same_bytes)[0].run_on == 1


def test_no_more_is_kept_than_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "MOST_KEPT_BYTES", 2 * 3 * 3 * 4)  # two outputs of three images, three numbers each
    first, _, _ = ask(tmp_path, make_batch(0), make_batch(1))
    again, outputs, _ = ask(tmp_path, make_batch(0), make_batch(1))
    assert (first.run_on, again.run_on) == (6, 3)
    assert np.array_equal(outputs[0], Network().run(NAMES, {"images": make_batch(1)})[0])


def test_what_was_run_before_a_stop_is_kept(tmp_path: Path) -> None:
    network, kept = Network(), KeptOutputs(tmp_path, print)
    with pytest.raises(KeyboardInterrupt), kept.saving():
        kept.open(INT8, b"graph", network.open).run(NAMES, {"images": make_batch(0)})
        raise KeyboardInterrupt
    assert ask(tmp_path, make_batch(0))[0].opened == 0


def test_what_is_damaged_or_of_another_graph_or_machine_is_run_again_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(tmp_path, make_batch(0))[1]
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    assert path.name == "onnxruntime-int8.npz"
    middle = data.index(whole[0].tobytes())
    listed = data.index(b"PK\x01\x02")  # in the zip's table: flags 8 bytes behind, and then how it is packed
    locked, packed = (data[: listed + at] + bytes([value]) + data[listed + at + 1 :] for at, value in ((8, 1), (10, 8)))
    zeros, fewer = data[:middle] + b"\0\0\0" + data[middle + 3 :], data.replace(b"(3, 3)", b"(2, 3)")
    for broken in (b"", b"{}", data[:-40], zeros, fewer, locked, packed):
        path.write_bytes(broken)
        network, outputs, lines = ask(tmp_path, make_batch(0))
        assert network.run_on == 3
        assert lines == ["engines: compares their answers again: onnxruntime-int8.npz is damaged"]
        assert np.array_equal(outputs[0], whole[0])
        assert ask(tmp_path, make_batch(0))[0].run_on == 0, "and kept again"
    path.unlink()
    path.mkdir()
    network, _, lines = ask(tmp_path, make_batch(0))
    assert network.run_on == 3 and lines[1] == (
        "engines: their answers cannot be kept (Is a directory): the next threshold takes longer"
    )
    path.rmdir()
    ask(tmp_path, make_batch(0))
    said = "engines: compares their answers again: what is kept of them is of another "
    network, _, lines = ask(tmp_path, make_batch(0), graph=b"other")
    assert (network.run_on, lines) == (3, [f"{said}graph"])
    known = processor.describe_machine("onnxruntime")
    for other in ({"onnxruntime": "0.1"}, {"processor": ["another"], "threads": 99}):
        with monkeypatch.context() as patch:
            patch.setattr(runtimes, "describe_machine", lambda *names, other=other: {**known, **other})
            network, _, lines = ask(tmp_path, make_batch(0), graph=b"other")
            assert (network.run_on, lines) == (3, [f"{said}{' and '.join(other)}"])
            assert ask(tmp_path, make_batch(0), graph=b"other")[0].run_on == 0
        ask(tmp_path, make_batch(0), graph=b"other")


def test_a_full_disk_is_told_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        network, _, lines = ask(tmp_path, make_batch(0))
    said = "engines: their answers cannot be kept (No space left on device): the next threshold takes longer"
    assert (network.run_on, lines, list(tmp_path.iterdir())) == (3, [said], [])


def test_an_engine_that_does_not_load_says_so_at_once(predictor: Predictor, tmp_path: Path) -> None:
    def open_nothing(engine: str, model_bytes: bytes, open_it: object) -> object:
        def fail() -> None:
            raise BundleError("bundle", "does not load")

        return KeptOutputs(tmp_path, print).open(engine, model_bytes, fail)

    assert open_runtime(predictor, INT8, open_nothing).predictor is None


def test_what_a_report_approves(tmp_path: Path) -> None:
    rows = [
        {"runtime": INT8, "approved": True},
        {"runtime": "openvino int8", "approved": False},
        {"runtime": "my own", "approved": True},
    ]
    report = tmp_path / "intervals.json"
    report.write_text(json.dumps({"bundle": "b" * 64, "runtimes": rows}))
    assert load_approved(tmp_path, "b" * 64) == (INT8,)
    assert load_approved(tmp_path, "a" * 64) is None, "it is about another bundle"
    for text in ("", "[]", "{}", '{"bundle": 1}', json.dumps({"bundle": "b" * 64, "runtimes": [1]})):
        report.write_text(text)
        assert load_approved(tmp_path, "b" * 64) is None
    assert load_approved(tmp_path / "none", "b" * 64) is None
