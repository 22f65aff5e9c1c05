"""Which parts of a test side are judged on their own."""

from dataclasses import replace

import numpy as np
import pytest

from visionloop.evaluation.slices import make_slices
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
    records = [replace(r, group="film" if i >= 50 else None, captured_at="2026-03-01") for i, r in enumerate(records)]
    found = {one.name: one.rows_n.tolist() for one in make_slices(records)}
    assert found == {
        "grouped=no": list(range(50)),
        "grouped=yes": list(range(50, 90)),
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


def test_no_image_has_no_slice():
    assert make_slices([]) == []
