"""ingest.expect: everything that is broken is named at once; what is not asked for is not checked."""

from dataclasses import replace
from typing import Any

import pytest

from visionloop.errors import SourceError
from visionloop.ingest.merge import check_expectations
from visionloop.params import make_params
from visionloop.records import ImageRecord

RECORD = ImageRecord("a", ("cat",), ("s",), ("s:a.jpg",), 0, None, "a", "train", None, 640, 480, "JPEG", 99, "")
CATS = [replace(RECORD, sha256=f"c{i}") for i in range(6)]
DOGS = [replace(RECORD, sha256=f"d{i}", labels=("dog",)) for i in range(2)]
OTHERS = [
    replace(RECORD, sha256="u", labels=()),
    replace(RECORD, sha256="x", labels=("cow",), side="excluded", width=9),
]


def check(**expect: Any) -> None:
    params = make_params({"name": "pets", "ingest": {"expect": expect}})
    check_expectations("pets", params.ingest.expect, [*CATS, *DOGS, *OTHERS])


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"classes": ["cat"]}, r"classes that are not expected \(dog: 2 images\)"),
        ({"classes": ["cat", "dog", "emu"], "min_per_class": 3}, r"fewer than 3 images of dog: 2, emu: 0;"),
        ({"max_imbalance": 2.5}, r"3\.0 times as many images of cat \(6\) as of dog \(2\), not 2\.5"),
        ({"size_px": [500, 1000]}, r"9 images with a side outside 500 to 1000 px \(s:a\.jpg 640x480, .* and 4 more\)"),
        ({"size_px": [32, 600]}, r"9 images with a side outside 32 to 600 px"),
        ({"sources": ["t"]}, r"sources that may not deliver \(s\)"),
    ],
    ids=["classes", "min", "imbalance", "small", "large", "sources"],
)
def test_what_is_broken_is_named(expect: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        check(**expect)


def test_all_that_is_broken_is_in_one_error() -> None:
    with pytest.raises(SourceError) as caught:
        check(classes=["cat"], min_per_class=4, sources=["t"])
    assert caught.value.found == (
        "classes that are not expected (dog: 2 images); fewer than 4 images of dog: 2; sources that may not deliver (s)"
    )
    assert "no version was made" in str(caught.value)


def test_a_dataset_as_expected_passes() -> None:
    check()
    check(classes=["cat", "dog"], min_per_class=2, max_imbalance=3, size_px=[480, 640], sources=["s"])
