"""Answer for images with model.onnx and card.json alone.

Needs Python 3.10 or newer, and: pip install onnxruntime numpy pillow

    python predict.py photo.jpg other.png     one line of JSON for each image
    python predict.py --check                 the example images again, compared with the answers beside them

An image that cannot be read has an `error` in its line. Exit code 2: none could be read, as of `visionloop predict`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

HERE = Path(__file__).parent
BAR_COLOUR = (128, 128, 128)  # beside an image that `letterbox` does not fill out
TOLERANCE = 0.05  # of a probability: this program resizes with a little less care than the one that trained


def load_image(path: Path, card: dict[str, Any]) -> np.ndarray:
    """Return an image as the model takes it: uint8, (height, width, 3), RGB. Raises OSError."""
    size_hw, resize, max_pixels = card["image_size"], card["resize"], card["max_pixels"]
    opened = Image.open(path)
    if opened.width * opened.height > max_pixels:
        raise OSError(f"has {opened.width} x {opened.height} pixels; at most {max_pixels:,} are read")
    image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image)
        image = flat
    image, (height, width) = image.convert("RGB"), size_hw
    if resize == "fit_crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    elif resize == "letterbox":
        image = ImageOps.pad(image, (width, height), Image.Resampling.BILINEAR, color=BAR_COLOUR)
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8)


def compute_probabilities(logits_k: np.ndarray, card: dict[str, Any]) -> np.ndarray:
    """Return the probability of each class: of its own for several labels an image, else they sum to 1."""
    biases = card.get("biases") or {}
    scaled_k = logits_k.astype(np.float64) / card["temperature"] + [biases.get(name, 0.0) for name in card["classes"]]
    if card["task"] == "multilabel":
        return np.asarray(1 / (1 + np.exp(-scaled_k)))
    exp_k = np.exp(scaled_k - scaled_k.max())
    return np.asarray(exp_k / exp_k.sum())


def answer(session: ort.InferenceSession, card: dict[str, Any], image: np.ndarray) -> dict[str, Any]:
    """Return the answer for one image. `labels` are all that the model gives it: one, or for multilabel any number."""
    logits_k = session.run(["logits"], {"images": image[None]})[0][0]
    probs_k = compute_probabilities(logits_k, card)
    classes = card["classes"]
    if card["task"] == "multilabel":
        thresholds = card.get("thresholds") or {}
        labels = [name for name, p in zip(classes, probs_k) if p >= thresholds.get(name, 0.5)]  # noqa: B905
    elif card.get("threshold") is not None:
        labels = [classes[int(probs_k[1] >= card["threshold"])]]
    else:
        labels = [classes[int(probs_k.argmax())]]
    found: dict[str, Any] = {"labels": labels}
    least = (card.get("abstain") or {}).get("confidence")
    if least is not None:  # the card's other rule, how unlike an image is, needs visionloop
        found["is_sure"] = compute_confidence(probs_k, labels, card) >= least
    return {**found, "probabilities": {c: round(float(p), 6) for c, p in zip(classes, probs_k)}}  # noqa: B905


def compute_confidence(probs_k: np.ndarray, labels: list[str], card: dict[str, Any]) -> float:
    """Return the probability of the answer; of several labels: the product over all classes, given or not."""
    said_k = np.array([name in labels for name in card["classes"]])
    if card["task"] == "multilabel":
        return float(np.where(said_k, probs_k, 1 - probs_k).prod())
    return float(probs_k[said_k][0])


def main(arguments: list[str]) -> int:
    """Answer for the images that are named, or check the examples. Returns the exit code."""
    if not arguments:
        print(__doc__)
        return 2
    card = json.loads((HERE / "card.json").read_text(encoding="utf-8"))
    session = ort.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
    if arguments == ["--check"]:
        return check(session, card)
    failed = 0
    for name in arguments:
        try:
            image = load_image(Path(name), card)
        except OSError as exc:
            print(json.dumps({"path": name, "error": str(exc)}))
            failed += 1
            continue
        print(json.dumps({"path": name, **answer(session, card, image)}, ensure_ascii=False))
    return 2 if failed == len(arguments) else 0


def check(session: ort.InferenceSession, card: dict[str, Any]) -> int:
    """Answer for the example images again. Returns 1 if an answer is not the one that it was."""
    wanted = json.loads((HERE / "examples" / "answers.json").read_text(encoding="utf-8"))
    worst = 0.0
    for name, probabilities in wanted.items():
        image = load_image(HERE / "examples" / name, {**card, "max_pixels": float("inf")})  # of any size
        found = answer(session, card, image)["probabilities"]
        worst = max(worst, *(abs(found[label] - p) for label, p in probabilities.items()))
    print(f"{len(wanted)} examples: the largest difference of a probability is {worst:.4f}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
