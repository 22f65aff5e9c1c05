"""A model for people without visionloop: its graph, its classes, example images, and a short program that uses it."""

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path

from visionloop.bundle import INT8_MODEL, MODEL
from visionloop.errors import DiskError
from visionloop.predictor import Predictor

README = """# {name}: an image classifier

{summary}

```
pip install onnxruntime numpy pillow
python predict.py photo.jpg
python predict.py --check
```

| file | holds |
|---|---|
| `model.onnx` | the network, with scaling and normalisation inside |
{int8}| `card.json` | input size, how an image is resized (`{resize}`), temperature, thresholds, origin |
| `labels.txt` | the classes, one a line, in the order of the logits |
| `predict.py` | a short program that shows how to use them; it needs nothing of visionloop |
| `examples/` | a few images, and the probabilities that the model gives them |

The graph takes `images`, uint8, n x {height} x {width} x 3, RGB, and gives `logits` (n, {classes}) and `embedding`.

Bundle {digest}. Trained on dataset {dataset} version {version}. {licence}
"""

INT8_ROW = (
    "| `model.int8.onnx` | the same network in int8: faster on a CPU; `card.json` says how far its answers go |\n"
)


def write_handout(predictor: Predictor, folder: Path) -> list[str]:
    """Write the model into a new or empty folder, whole or not at all; return the names of what is there.

    Raises:
        DiskError: the folder is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = "is not empty" if folder.is_dir() else "is a file"
        raise DiskError(str(folder), found, "a new or empty folder", "Name another one.")
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        staged.mkdir(parents=True)
        _fill(predictor, staged)
        if folder.exists():
            folder.rmdir()
        staged.rename(folder)
    except OSError as exc:
        shutil.rmtree(staged, ignore_errors=True)
        raise DiskError(
            f"{folder}", f"cannot be written ({exc.strerror})", "a place to write to", "Make room."
        ) from exc
    return sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())


def _fill(predictor: Predictor, folder: Path) -> None:
    bundle, card = predictor.bundle, predictor.card
    for name in [MODEL, *[INT8_MODEL] * (bundle.folder / INT8_MODEL).is_file(), "card.json"]:
        shutil.copyfile(bundle.folder / name, folder / name)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in card.classes), encoding="utf-8")
    program = files("visionloop.promotion").joinpath("standalone.py").read_text(encoding="utf-8")
    (folder / "predict.py").write_text(program, encoding="utf-8")
    (folder / "examples").mkdir()
    names = json.loads((bundle.folder / "golden" / "answers.json").read_text())["images"]
    answers = {}
    outputs = predictor.run_batches(predictor.decode_golden(bundle.golden_images()))  # of any size
    for name, answer in zip(names, predictor.answer(outputs), strict=True):
        shutil.copyfile(bundle.folder / "golden" / name, folder / "examples" / name)
        answers[name] = {label: round(p, 6) for label, p in answer.probabilities.items()}
    text = json.dumps(answers, indent=1, ensure_ascii=False)
    (folder / "examples" / "answers.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_describe(predictor), encoding="utf-8")


def _describe(predictor: Predictor) -> str:
    card = predictor.card
    height, width = card.image_size
    shown = ", ".join(card.classes[:20]) + (f" and {len(card.classes) - 20} more" if len(card.classes) > 20 else "")
    several = "any number of" if card.task == "multilabel" else "one of"
    licence = (card.network.get("weights") or {}).get("license")
    return README.format(
        name=card.name,
        summary=f"Gives an image {several} {len(card.classes)} classes: {shown}.",
        height=height,
        width=width,
        classes=len(card.classes),
        resize=card.resize,
        digest=predictor.digest,
        dataset=card.dataset.get("name", card.name),
        version=card.dataset.get("version", "unknown"),
        int8=INT8_ROW if (predictor.bundle.folder / INT8_MODEL).is_file() else "",
        licence=f"It started from weights under {licence}." if licence else "",
    )
