"""The suite gives the same answer on every processor: what tests train and embed with does not follow its flags."""

from pathlib import Path

import pytest

import shapes
import trainings
from visionloop.features.runtimes import list_candidates
from visionloop.networks import processor
from visionloop.params import Params, Train, load_params, make_params
from visionloop.training.precision import Precision, resolve_precision


def read_params(folder: Path, text: str) -> Params:
    (folder / "params.yaml").write_text(text.replace("EPOCHS", "1"))
    return load_params(folder / "params.yaml")


def test_what_tests_train_and_embed_with_is_the_same_on_every_processor(each_processor: str, tmp_path: Path) -> None:
    for params in (read_params(tmp_path, shapes.PARAMS), make_params(trainings.PARAMS)):
        assert resolve_precision(params.train, "cpu") == Precision("fp32", "as train.precision says")
        assert list_candidates(params.embed.runtime, "cpu") == ["onnxruntime fp32"]


def test_a_pretended_processor_is_believed(each_processor: str) -> None:
    assert processor.has_bf16() is (each_processor == "bf16")
    assert processor.read_cpu_name() == f"Pretended {each_processor}"
    assert (resolve_precision(Train(), "cpu") is None) is (each_processor == "bf16")
    assert ("torch bf16" in list_candidates("auto", "cpu")) is (each_processor == "bf16")


def test_a_test_that_would_measure_fails() -> None:
    with pytest.raises(AssertionError, match="a test inherits `auto`"):
        processor.time_in_turn({"fp32": float}, 1)
