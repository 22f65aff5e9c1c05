"""Which parts of a test side are judged on their own."""

from dataclasses import replace

import numpy as np
import pytest

from visionloop.evaluation.slices import Slice, compute_slice_figures, make_slices, measure_images
from visionloop.records import ImageRecord

ONE = ImageRecord(
    sha256="0" * 64,
    labels=("a",),
    sources=("cam1",),
    origins=("cam1/0.png",),
    ordinal=0,
    group=None,
    key="0" * 64,
    side="test",
    captured_at=None,
    width=100,
    height=100,
    format="JPEG",
    num_bytes=1000,
    phash="",
)


def test_slices_follow_the_manifest():
    records = [replace(ONE, sources=("cam1", "cam2") if i < 40 else ("cam2",), width=100 + i) for i in range(90)]
    records = [
        replace(r, group="film" if i >= 50 else None, captured_at="2026-03-01T08:00:00Z") for i, r in enumerate(records)
    ]
    found = {one.name: one.rows_n.tolist() for one in make_slices(records)}
    assert found == {
        "kind=group": list(range(50, 90)),
        "kind=single": list(range(50)),
        "shape=wide": list(range(1, 90)),
        "size=low": list(range(30)),
        "size=middle": list(range(30, 60)),
        "size=high": list(range(60, 90)),
        "source=cam1": list(range(40)),
    }


@pytest.mark.parametrize(("number", "names"), [(29, []), (30, ["source=b"])])
def test_a_slice_of_fewer_than_30_images_is_left_out(number, names):
    records = [replace(ONE, sources=("b",) if i < number else ("cam1",)) for i in range(number + 20)]
    assert [one.name for one in make_slices(records)] == names


def test_measures_are_cut_into_thirds_and_equal_values_stay_together():
    bright_n = np.array([0.1] * 50 + [0.5] * 40 + [0.9] * 10)
    found = make_slices([ONE] * 100, {"brightness": bright_n}, min_support=5)
    assert [(one.name, len(one.rows_n)) for one in found] == [
        ("brightness=high", 10),
        ("brightness=low", 50),
        ("brightness=middle", 40),
    ]


def test_times_sources_and_near_duplicates_are_slices():
    records = [replace(ONE, captured_at=f"2026-0{1 + i % 2}-01 0{i % 3}:30", key="f" * (i % 2)) for i in range(120)]
    records = [replace(r, key=r.key or r.sha256) for r in records] + [ONE]
    names = [one.name for one in make_slices(records)]
    assert names == [
        "hour=00",
        "hour=01",
        "hour=02",
        "kind=near duplicates",
        "kind=single",
        "month=2026-01",
        "month=2026-02",
    ]


def test_slices_come_worst_first_with_intervals_over_keys():
    hits_n = np.arange(90) >= 30
    slices = [Slice("source=10", np.arange(60, 90)), Slice("source=2", np.arange(30, 60)), Slice("x", np.arange(60))]
    found = compute_slice_figures(slices, hits_n, np.arange(90) // 10)
    assert [(one.name, one.num_images, one.num_keys, one.accuracy.value) for one in found] == [
        ("x", 60, 6, 0.5),
        ("source=2", 30, 3, 1.0),
        ("source=10", 30, 3, 1.0),
    ]
    assert found[0].accuracy.low < 0.2
    assert found[1].accuracy.low == pytest.approx(0.4385, abs=1e-3)  # Wilson's of 3 of 3


def test_brightness_contrast_and_sharpness_are_those_of_the_pixels():
    flat, checks = np.full((1, 32, 32, 3), 128, np.uint8), np.zeros((1, 32, 32, 3), np.uint8)
    checks[:, ::2, 1::2] = checks[:, 1::2, ::2] = 255
    found = measure_images(np.concatenate([flat, checks, checks // 2]))
    assert found["brightness"] == pytest.approx([128 / 255, 0.5, 0.249], abs=1e-3)
    assert found["contrast"] == pytest.approx([0, 0.5, 0.249], abs=1e-3)
    assert found["sharpness"] == pytest.approx([0, 16, 16 * (127 / 255) ** 2], abs=1e-3)


def test_no_image_has_no_slice():
    assert make_slices([]) == []
