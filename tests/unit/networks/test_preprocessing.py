"""The pixels that an ONNX encoder wants, read from what Hugging Face's tools write, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders import CLIP, CLIP_MEAN, CLIP_STD
from visionloop.errors import TrainingError
from visionloop.networks.preprocessing import IMAGENET, RAW, Preprocessing, choose_preprocessing, read_preprocessor
from visionloop.params.train import PREPROCESSOR, Normalisation, Train

OLD = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "size": 224, "crop_size": 224, "do_center_crop": True}


def read(folder: Path, value: Any) -> Preprocessing:
    path = folder / PREPROCESSOR
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return read_preprocessor(path)


@pytest.mark.parametrize(
    ("value", "known"),
    [
        (CLIP, Preprocessing(CLIP_MEAN, CLIP_STD, 32, "bicubic", 1.0)),
        ({**OLD, "resample": 2}, Preprocessing(CLIP_MEAN, CLIP_STD, 224, "bilinear", 1.0)),
        ({**CLIP, "do_normalize": False}, Preprocessing((0.0,) * 3, (1.0,) * 3, 32, "bicubic", 1.0)),
        ({"do_normalize": False, "do_rescale": False}, RAW),
        (
            {**CLIP, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            Preprocessing(CLIP_MEAN, CLIP_STD, 224, "bicubic", 0.875),
        ),
        ({**OLD, "do_center_crop": False, "size": {"height": 336, "width": 448}}, Preprocessing(CLIP_MEAN, CLIP_STD)),
    ],
    ids=["clip", "before-rescaling", "unnormalised", "raw", "cropped", "no-square"],
)
def test_the_file_beside_an_encoder_says_its_pixels(value: Any, known: Preprocessing, tmp_path: Path) -> None:
    assert read(tmp_path, value) == known


def test_a_rescale_factor_other_than_usual_gives_the_same_numbers(tmp_path: Path) -> None:
    """ViViT's and EfficientNet's files rescale by 1 / 127.5; the rest subtracts the mean of what comes of it."""
    x = np.array([0.0, 100.0, 255.0])
    found = read(tmp_path, {"image_mean": [1, 0.5, 0], "image_std": [1, 2, 0.5], "rescale_factor": 1 / 127.5})
    for channel, (mean, std) in enumerate(zip((1, 0.5, 0), (1, 2, 0.5), strict=True)):
        ours = (x / 255 - found.mean_c[channel]) / found.std_c[channel]
        np.testing.assert_allclose(ours, (x / 127.5 - mean) / std, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"do_normalize": True, "image_std": CLIP_STD}, "it has no 'image_mean'"),
        ({**CLIP, "image_mean": None}, "'NoneType' object is not iterable"),
        ({**CLIP, "image_mean": [0.5]}, "not enough values to unpack (expected 3, got 1)"),
        ({**CLIP, "image_std": [1, 0, 1]}, "image_std 0, rescale_factor 0.00392157"),
        ({**CLIP, "rescale_factor": -1}, "image_std 0.261303, rescale_factor -1"),
        ('{"image_mean": [NaN, 0, 0], "image_std": [1, 1, 1]}', "a colour is not finite"),
        ("[1, 2]", "it holds no keys"),
        ("not json", "Expecting value: line 1 column 1 (char 0)"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        (" " * (2 << 20), "it is too large"),
    ],
)
def test_a_file_that_does_not_say_it_is_refused_in_one_line(value: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        read(tmp_path, value)
    text = str(caught.value)
    assert text.startswith(f"preprocessor_config.json: cannot be used ({why}")
    assert text.endswith("Or: Set train.preprocessing to {mean: [...], std: [...]}, to imagenet, or to none.")


def test_what_params_say_counts_more_than_the_file_beside(tmp_path: Path) -> None:
    file = tmp_path / "e.onnx"
    (tmp_path / PREPROCESSOR).write_text(json.dumps(CLIP))

    def choose(preprocessing: Any) -> tuple[Preprocessing, str]:
        return choose_preprocessing(Train(backbone="e.onnx", way="knn", preprocessing=preprocessing), file)

    assert choose(None) == (Preprocessing(CLIP_MEAN, CLIP_STD, 32, "bicubic", 1.0), PREPROCESSOR)
    assert choose("imagenet") == (IMAGENET, "params.yaml (imagenet)")
    assert choose("none") == (RAW, "params.yaml (none)")
    asked = Normalisation(mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0), rescale_factor=1.0)
    found, source = choose(asked)
    np.testing.assert_allclose([found.mean_c, found.std_c], [[127 / 255] * 3, [128 / 255] * 3])
    assert source == "params.yaml"
