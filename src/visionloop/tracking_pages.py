"""What MLflow's pages show of a run and of a registered version besides figures: source, dataset, signature, words.

`tracking.py` opens the server and decides when; it alone uses this.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionloop.errors import shorten
from visionloop.records import Card, Decision, Pin
from visionloop.secrets import mask

MAX_DIGEST_CHARS = 36  # of a dataset, in MLflow
REPORT = "evaluation/report.html"  # of a run's artifacts
COMMIT_TAG = "visionloop.git_commit"
NOTE_TAG, OUR_NOTE_TAG = "mlflow.note.content", "visionloop.note"
PROCESS_WIDE = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")  # what MLflow's own functions leave in the environment


@dataclass(frozen=True)
class UsedDataset:
    """The dataset version that a run has used: `address` is its commit object in the store, without secrets."""

    name: str
    version: int
    digest: str
    address: str = ""
    num_images: int = 0
    num_classes: int = 0

    @property
    def title(self) -> str:
        return f"{self.name} version {self.version}"

    @property
    def short_digest(self) -> str:
        return self.digest[:MAX_DIGEST_CHARS]

    def describe(self) -> str:
        """Return the dataset in words: `pets version 3 (1,283 images, 2 classes)`."""
        return f"{self.title} ({self.num_images:,} images, {self.num_classes} classes)"


def make_used_dataset(pin: Pin, store_url: str) -> UsedDataset:
    """Return a pinned version as a run's dataset."""
    address = f"{mask(store_url)}/datasets/{pin.name}/{pin.version:06d}.json"
    return UsedDataset(pin.name, pin.version, pin.digest, address, pin.num_images, len(pin.classes))


def name_run(network: str, way: str, version: object) -> str:
    """Return how a run is called: `resnet18-frozen-dataset3`, which tells trainings apart in a list."""
    return "-".join([part for part in (network, way) if part] + [f"dataset{version}"])


def load_card(model_path: Path) -> Card | None:
    """Return the card beside a bundle's model; None if there is none that can be read."""
    try:
        return Card.from_json(json.loads((model_path.parent / "card.json").read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def make_source_tags(kind: str, tags: Mapping[str, str], user: str) -> dict[str, str]:
    """Return the tags that fill MLflow's columns Source, Version and User."""
    commit = tags.get(COMMIT_TAG, "none").removesuffix("-dirty").removeprefix("none")
    more = {"mlflow.user": user, "mlflow.source.git.commit": commit}
    shown = {name: value for name, value in more.items() if value}
    return {"mlflow.source.name": f"visionloop {kind}", "mlflow.source.type": "LOCAL", **shown}


def make_note(text: str) -> dict[str, str]:
    """Return the tags that fill a run's description. The second tells it from what a person has written there since."""
    return {NOTE_TAG: text, OUR_NOTE_TAG: text}


def make_verdict_tags(decision: Decision, known: Mapping[str, str]) -> dict[str, str]:
    """Return what a run shows of the gate's decision. `known`: its tags; a description by a person stays."""
    tags = {"visionloop.verdict": decision.verdict, "visionloop.decision": str(decision.number)}
    if known.get(NOTE_TAG, "") != known.get(OUR_NOTE_TAG, ""):
        return tags
    models = {"accuracy": decision.metrics, "champion": decision.champion_metrics}
    figures = [f"{name} {found['accuracy']['value']:.4f}" for name, found in models.items() if "accuracy" in found]
    data = decision.dataset
    text = f"{decision.verdict} (decision {decision.number}): {', '.join(figures) or 'no figures'}"
    return tags | make_note(f"{text}, on {decision.num_test:,} test images of {data['name']} version {data['version']}")


def make_dataset_input(used: UsedDataset, context: str) -> Any:
    """Return what fills MLflow's column Dataset; `context` is what it was used for."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = "s3" if used.address.startswith("s3://") else "local"
    profile = {"num_images": used.num_images, "num_classes": used.num_classes, "digest": used.digest}
    dataset = Dataset(
        name=used.title,
        digest=used.short_digest,
        source_type=kind,
        source=json.dumps({"uri": used.address}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", context)])


def make_signature(model: Any) -> Any:
    """Return the signature of an ONNX model: names, types and sizes of its inputs and outputs; -1 is any number."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec
    from onnx import helper

    def make_schema(values: Any) -> Any:
        specs: list[Any] = []
        for value in values:
            tensor = value.type.tensor_type
            sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            specs.append(TensorSpec(helper.tensor_dtype_to_np_dtype(tensor.elem_type), tuple(sizes), value.name))
        return Schema(specs)

    return ModelSignature(make_schema(model.graph.input), make_schema(model.graph.output))


def log_model(run_id: str, model: Any) -> Any:
    """Log an ONNX model with its signature in a run; return what MLflow says of it. In `own_process` only."""
    import mlflow

    return mlflow.onnx.log_model(
        model,
        name="model",
        run_id=run_id,
        signature=make_signature(model),
        save_as_external_data=False,
        pip_requirements=["onnxruntime"],
        onnx_execution_providers=["CPUExecutionProvider"],
    )


@dataclass(frozen=True)
class Words:
    """What a registered version is found by, and its description."""

    tags: Mapping[str, str]
    text: str | None


def describe_for(client: Any, run_id: str, model_id: str, card: Card | None, digest: str) -> Words:
    """Copy the test figures of a run to its model, and return the words for the version."""
    from mlflow.entities import Metric

    if card is None:
        return Words({}, None)
    run, now_ms = client.get_run(run_id), int(time.time() * 1000)
    figures = {key: value for key, value in run.data.metrics.items() if key.startswith("test/")}
    used = UsedDataset(card.name, card.dataset["version"], card.dataset["digest"])
    facts = {"model_id": model_id, "dataset_name": used.title, "dataset_digest": used.short_digest}
    client.log_batch(run_id, metrics=[Metric(k, v, now_ms, 0, run_id=run_id, **facts) for k, v in figures.items()])
    page = f"#/experiments/{run.info.experiment_id}/runs/{run_id}"
    links = {f"run {run.info.run_name}": page, "report": f"{page}/artifacts/{REPORT}"}
    addresses = [json.loads(one.dataset.source).get("uri") for one in run.inputs.dataset_inputs]
    shown = {key.removeprefix("test/"): v for key, v in figures.items() if not key.endswith(("_low", "_high"))}
    train = card.params.get("train", {})
    tags = {"task": card.task, "backbone": card.network.get("backbone"), "way": train.get("way")}
    text = describe_version(card, digest, shown, links, addresses[0] if addresses else "")
    return Words({f"visionloop.{key}": str(value) for key, value in tags.items() if value}, text)


def describe_restored(card: Card | None) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Return name, tags and params of the run of a bundle whose training is not known here."""
    if card is None:
        return "restored", {}, {}
    train, version = card.params.get("train", {}), card.dataset.get("version")
    name = name_run(str(card.network.get("backbone", "")), train.get("way", ""), version)
    params = {f"train.{key}": value for key, value in train.items()}
    words = make_note(f"Made for a bundle whose training is not known here: {card.name} version {version}")
    return name, {"visionloop.dataset_version": str(version), **words}, params


def describe_version(
    card: Card, digest: str, figures: Mapping[str, float], links: Mapping[str, str], address: str = ""
) -> str:
    """Return what goes in, what comes out, how good it is, and where it comes from, as MLflow shows it: Markdown.

    `address` is that of the dataset version in the store.
    """
    height, width = card.image_size
    way = card.params.get("train", {}).get("way", "")
    values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(figures.items()))
    dataset = f"{card.dataset.get('name')} version {card.dataset.get('version')}"
    dataset += f" (`{str(card.dataset.get('digest'))[:12]}`){f' at {_quote(address)}' if address else ''}"
    lines = [
        f"**{card.name}**: {card.task}, {len(card.classes)} classes ({_quote(shorten(card.classes))}), by "
        f"{_quote(str(card.network.get('backbone')))}{f', way `{way}`' if way else ''}",
        f"**Goes in**: `images`, uint8, (n, {height}, {width}, 3): RGB by `{card.resize}`. It scales them itself.",
        f"**Comes out**: {_describe_logits(card)} `embedding`, float32: a vector for each image.",
        f"**On its test side**: {values or 'not evaluated yet'}",
        f"**From**: dataset {dataset}, " + ", ".join(f"[{name}]({link})" for name, link in links.items()),
        f"**Bundle** `{digest}`: all that serves it is in the store under this digest.",
    ]
    return "\n\n".join(lines)


def _quote(text: str) -> str:
    """Return a text of anybody as code of Markdown, where nothing in it is markup."""
    return f"`{' '.join(text.replace('`', '').split())}`"


def _describe_logits(card: Card) -> str:
    names = "in the order of the classes"
    scaled = "logits" if card.temperature == 1 else f"logits / {card.temperature:g}"
    rule = f"softmax({scaled}) are the probabilities"
    if card.task == "multilabel":
        rule = f"sigmoid({scaled}) are the probabilities, each label on its own"
    elif card.threshold is not None:
        rule += f", {_quote(card.classes[1])} from {card.threshold:g} on"
    return f"`logits`, float32, (n, {len(card.classes)}), {names}: {rule}."


@contextlib.contextmanager
def own_process(folder: Path) -> Iterator[None]:
    """Let MLflow's own functions change this process only in here: its environment, and where they stage copies.

    Staged in the workspace, a kill leaves nothing in the system's temporary folder. A tracking URI that stayed in the
    environment would be that of the next workspace which this process opens.
    """
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    variables = {name: os.environ.get(name) for name in PROCESS_WIDE}
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield
    finally:
        tempfile.tempdir = before
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
