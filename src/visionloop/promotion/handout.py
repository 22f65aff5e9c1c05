"""A model for people without visionloop: its graph, its classes, example images, and a short program that uses it."""

import json
import os
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from visionloop.bundle import INT8_MODEL, MODEL
from visionloop.errors import DiskError
from visionloop.predictor import FP32, Predictor

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


def write_handout(predictor: Predictor, folder: Path, approved: Sequence[str]) -> list[str]:
    """Write the model into a new or empty folder, whole or not at all; return the names of what is there.

    The graph in int8 only if an engine in int8 is `approved`: the graph in fp32 is what was judged.

    Raises:
        DiskError: the folder is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = "is not empty" if folder.is_dir() else "is a file"
        raise DiskError(str(folder), found, "a new or empty folder", "Name another one.")
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        staged.mkdir(parents=True)
        _fill(predictor, staged, with_int8=_has_int8(predictor) and _is_in_int8(approved))
        if folder.exists():
            folder.rmdir()
        staged.rename(folder)
    except OSError as exc:
        shutil.rmtree(staged, ignore_errors=True)
        raise DiskError(
            f"{folder}", f"cannot be written ({exc.strerror})", "a place to write to", "Make room."
        ) from exc
    return sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())


def describe_engines(predictor: Predictor, approved: Sequence[str]) -> list[str]:
    """Say which engines the model is approved for, and of each other one that was tried why it is not."""
    engines = predictor.card.engines or {}
    lines = [f"approved for {', '.join(dict.fromkeys((FP32, *approved)))}"]
    for name in [one for one in engines if one not in approved]:
        found = engines[name]
        why = "its card approves of it, but evaluate did not, by the test side"
        if not found.get("approved"):
            why = found.get("why") or f"{found.get('changed', '?')} of {found.get('images', '?')} answers differ"
        lines.append(f"not approved for {name}: {why}")
    return lines if not _has_int8(predictor) or _is_in_int8(approved) else [*lines, f"{INT8_MODEL} is left out"]


def _has_int8(predictor: Predictor) -> bool:
    return (predictor.bundle.folder / INT8_MODEL).is_file()


def _is_in_int8(approved: Sequence[str]) -> bool:
    return any(name.endswith("int8") for name in approved)


def _fill(predictor: Predictor, folder: Path, *, with_int8: bool) -> None:
    bundle, card = predictor.bundle, predictor.card
    for name in [MODEL, *[INT8_MODEL] * with_int8, "card.json"]:
        shutil.copyfile(bundle.folder / name, folder / name)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in card.classes), encoding="utf-8")
    program = files("visionloop.promotion").joinpath("standalone.py").read_text(encoding="utf-8")
    (folder / "predict.py").write_text(program, encoding="utf-8")
    (folder / "examples").mkdir()
    answers = {}
    outputs = predictor.run_batches(predictor.decode_golden(bundle.golden_images()))  # of any size
    for name, answer in zip(bundle.golden_names(), predictor.answer(outputs), strict=True):
        shutil.copyfile(bundle.folder / "golden" / name, folder / "examples" / name)
        answers[name] = {label: round(p, 6) for label, p in answer.probabilities.items()}
    text = json.dumps(answers, indent=1, ensure_ascii=False)
    (folder / "examples" / "answers.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_describe(predictor, with_int8=with_int8), encoding="utf-8")


def _describe(predictor: Predictor, *, with_int8: bool) -> str:
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
        int8=INT8_ROW if with_int8 else "",
        licence=f"It started from weights under {licence}." if licence else "",
    )
