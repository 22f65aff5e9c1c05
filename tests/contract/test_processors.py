"""The suite gives the same answer on every processor: what tests train and embed with does not follow its flags."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import shapes
import trainings
from processors import FLAGS, pretend
from visionloop.features.encoder import choose_runtime
from visionloop.networks import processor
from visionloop.params import Params, Train, load_params, make_params
from visionloop.training.job import read_hardware


@pytest.fixture(params=sorted(FLAGS))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A processor that is pretended: with instructions for bf16 ("bf16"), or without ("fp32")."""
    before = processor.CPUINFO
    pretend(request.param, tmp_path)
    yield request.param
    processor.CPUINFO = before


def read_params(folder: Path, text: str) -> Params:
    (folder / "params.yaml").write_text(text.replace("EPOCHS", "1"))
    return load_params(folder / "params.yaml")


def test_what_tests_train_and_embed_with_is_the_same_on_every_processor(kind: str, tmp_path: Path) -> None:
    for params in (read_params(tmp_path, shapes.PARAMS), make_params(trainings.PARAMS)):
        assert read_hardware(params.train).precision == "fp32"
        assert choose_runtime(params.embed.runtime) == ("onnxruntime", "fp32")


def test_a_pretended_processor_is_believed(kind: str) -> None:
    assert processor.has_bf16() is (kind == "bf16")
    assert read_hardware(Train(accelerator="cpu")).precision == kind
