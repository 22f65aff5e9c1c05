"""The pixels that a network wants: by its name, by params.yaml, or by a file of Hugging Face's tools. No torch.

Dimension: c channels (red, green, blue).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visionloop.errors import TrainingError
from visionloop.networks.names import BACKBONE
from visionloop.params.train import PREPROCESSOR, Normalisation, Train

ColourC = tuple[float, float, float]
WHERE = "params.yaml train.preprocessing"
TODO = "Set train.preprocessing to {mean: [...], std: [...]}, to imagenet, or to none."
MAX_BYTES = 1 << 20
# The numbers that Pillow, and so Hugging Face, has for interpolations.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Preprocessing:
    """What pixels a network was made for: x of 0 to 255 becomes (x / 255 - mean) / std, for red, green and blue.

    The rest is how its published weights were evaluated, None where there are none: the side of the square in pixels,
    the interpolation, and how much of the resized image's side that square is.
    """

    mean_c: ColourC = (0.485, 0.456, 0.406)
    std_c: ColourC = (0.229, 0.224, 0.225)
    side_px: int | None = None
    interpolation: str | None = None
    crop_ratio: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it for the card."""
        return {name: value for name, value in asdict(self).items() if value is not None}


IMAGENET = Preprocessing()
RAW = Preprocessing((0.0,) * 3, (1 / 255,) * 3)  # x as it is, from 0 to 255


def choose_preprocessing(section: Train, file: Path) -> tuple[Preprocessing, str]:
    """Return what pixels an ONNX encoder in a file wants, and who says so: params.yaml, or the file beside it.

    Raises:
        TrainingError: nobody says it, or the file beside it is damaged.
    """
    asked = section.preprocessing
    if asked == "imagenet":
        return IMAGENET, "params.yaml (imagenet)"
    if asked == "none":
        return RAW, "params.yaml (none)"
    if isinstance(asked, Normalisation):
        return _make(asked.mean, asked.std, asked.rescale_factor), "params.yaml"
    beside = file.with_name(PREPROCESSOR)
    if file.name == section.network_name and beside.is_file():
        return read_preprocessor(beside), PREPROCESSOR
    raise TrainingError(
        BACKBONE,
        f"nothing says which pixels {section.network_name} wants",
        f"train.preprocessing, or a {PREPROCESSOR} beside the file",
        TODO,
    )


def read_preprocessor(path: Path) -> Preprocessing:
    """Read a preprocessor_config.json. Where it leaves out `do_rescale`, pixels are rescaled, as its library does.

    Raises:
        TrainingError: it is no such file, or leaves out a mean or deviation that is to be used.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no keys")
        return _read(value)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        why = f"it has no {exc}" if isinstance(exc, KeyError) else str(exc)[:120] or type(exc).__name__
        expected = "image_mean and image_std, three numbers each"
        raise TrainingError(path.name, f"cannot be used ({why})", expected, f"Mend it. Or: {TODO}") from exc


def _read(value: Mapping[str, Any]) -> Preprocessing:
    mean_c, std_c = (0.0,) * 3, (1.0,) * 3
    if value.get("do_normalize", True):
        mean_c, std_c = _read_colour(value["image_mean"]), _read_colour(value["image_std"])
    factor = float(value.get("rescale_factor", 1 / 255)) if value.get("do_rescale", True) else 1.0
    if min(std_c) <= 0 or not 0 < factor < math.inf:
        raise ValueError(f"image_std {min(std_c):g}, rescale_factor {factor:g}")
    resized = _read_side(value.get("size")) if value.get("do_resize", True) else None
    cropped = _read_side(value.get("crop_size")) if value.get("do_center_crop", False) else None
    number = value.get("resample")
    return _make(
        mean_c,
        std_c,
        factor,
        side_px=cropped or resized,
        interpolation=INTERPOLATIONS.get(number) if isinstance(number, int) else None,
        crop_ratio=min(1.0, cropped / resized) if cropped and resized else None,
    )


def _make(mean_c: ColourC, std_c: ColourC, factor: float, **how: Any) -> Preprocessing:
    """Return it for x / 255: (x f - mean) / std = (x / 255 - mean / (255 f)) / (std / (255 f))."""
    scale = 255 * factor
    if abs(scale - 1) > 1e-6:
        mean_c, std_c = (tuple(value / scale for value in values) for values in (mean_c, std_c))  # type: ignore[assignment]
    return Preprocessing(mean_c, std_c, **how)


def _read_colour(value: Any) -> ColourC:
    red, green, blue = (float(each) for each in value)
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError("a colour is not finite")
    return red, green, blue


def _read_side(value: Any) -> int | None:
    """Return the side of a square: of a number, of {height, width}, or of {shortest_edge}; None for another size."""
    if isinstance(value, dict):
        sides = {value.get("height"), value.get("width")} if "height" in value else {value.get("shortest_edge")}
        value = sides.pop() if len(sides) == 1 else None
    return value if isinstance(value, int) and value > 0 else None
