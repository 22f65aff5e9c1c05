"""Golden images are read on every machine that serves."""

import numpy as np
import pytest

from fakes import make_image
from visionloop.data.images import load_array
from visionloop.training.package import _make_golden


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_every_machine_reads_is_golden_as_it_is(kind: str) -> None:
    data = make_image(1, kind=kind)
    assert _make_golden(data) is data


def test_what_only_some_machines_read_is_golden_as_png() -> None:
    data = make_image(1, kind="AVIF", size_hw=(40, 50))
    golden = _make_golden(data)
    assert golden.startswith(b"\x89PNG")
    ours, expected = (load_array(one, "x", size_hw=(32, 32), resize="squash") for one in (golden, data))
    assert np.array_equal(ours, expected)
