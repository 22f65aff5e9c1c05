"""The sections of params.yaml about learning: embed, train, tune."""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from visionloop.errors import ParamsError, shorten
from visionloop.params.section import Section, to_tuple

# They change what a result is compared by, or check it only.
NOT_TUNED = frozenset(
    {"on", "monitor", "weights_sha256", "backbone_sha256", "output", "preprocessing", "threshold", "abstain", "export"}
)
# What a network is packed with when it has learned all: another value trains nothing again.
AFTER_TRAINING = frozenset({"threshold", "abstain", "export"})
Way = Literal["scratch", "finetune", "frozen", "knn", "warm"]
WAYS_ON_EMBEDDINGS = frozenset({"frozen", "knn"})
# What only epochs can do, where it is not as by default; and what they go by, but has no meaning without them.
ONLY_BY_EPOCHS = ("clip_norm", "dropout", "ema", "schedule")
STEPS = ("accumulate", "batch_size", "learning_rate", "max_epochs", "patience", "weight_decay")
Ratio = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Colour = Annotated[tuple[float, float, float], BeforeValidator(to_tuple)]
REMOTE = ("s3://", "https://", "http://")
THRESHOLD_FORMS = (
    "a number between 0 and 1, max_f1, {precision: 0.95}, {recall: 0.9} or "
    "{cost: {false_positive: 1, false_negative: 5}}"
)
PREPROCESSOR = "preprocessor_config.json"  # what Hugging Face's tools write beside a model


def list_keys(section: type[BaseModel]) -> list[str]:
    """Return the keys of a section that can be tuned, nested ones as `neighbours.k`."""
    keys = []
    for name, field in section.model_fields.items():
        nested = field.annotation
        if name in NOT_TUNED:
            continue
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += [f"{name}.{inner}" for inner in nested.model_fields]
        else:
            keys.append(name)
    return keys


def check_key(section: type[BaseModel], key: str, values: Sequence[Any]) -> None:
    """Check one key of the space: that it is one, and that each of the values fits it by itself.

    Raises:
        ValueError: what was expected instead.
    """
    keys = list_keys(section)
    if key not in keys:
        near = difflib.get_close_matches(key, keys, cutoff=0.5)
        raise ValueError(f"keys of train; {key!r} is none that can be tuned, near: {shorten(near or keys)}")
    for value in values:
        try:
            section.model_validate(nest({key: value}))
        except ValidationError as exc:
            # Errors without a place are about keys that do not fit each other: other keys may vary as well.
            wrong = [error["msg"] for error in exc.errors(include_url=False) if error["loc"]]
            if wrong:
                raise ValueError(f"values of train.{key}; {value!r}: {wrong[0]}") from exc


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as mappings in each other: `{"a.b": 1}` is `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


class Embed(Section):
    """How images become embeddings, in batches. `auto`: onnxruntime in fp32, or what the hardware does faster."""

    batch_size: int = Field(default=500, ge=1, le=65_536)
    runtime: Literal["auto", "onnxruntime", "openvino", "torch"] = "auto"


class Neighbours(Section):
    """The way `knn`: how many neighbours vote, how near is measured, and the votes that each class has beforehand."""

    k: int = Field(default=5, ge=1, le=1000)
    metric: Literal["cosine", "euclidean"] = "cosine"
    vote: Literal["uniform", "distance"] = "uniform"
    smoothing: float = Field(default=0.1, gt=0, le=100)


class Normalisation(Section):
    """What an ONNX encoder is given for a pixel x of 0 to 255: (x * rescale_factor - mean) / std; red, green, blue."""

    mean: Colour
    std: Colour
    rescale_factor: float = Field(default=1 / 255, gt=0, le=1)

    @model_validator(mode="after")
    def _finite(self) -> "Normalisation":
        if not all(map(math.isfinite, self.mean)) or not all(0 < value < math.inf for value in self.std):
            raise ValueError("finite numbers, and `std` above 0")
        return self


class Cost(Section):
    """What a mistake costs, in any unit: a class wrongly given, and one that was missed."""

    false_positive: float = Field(gt=0, le=1e9)
    false_negative: float = Field(gt=0, le=1e9)


class Threshold(Section):
    """From which probability on a class is the answer; exactly one of these. A number alone is `at`."""

    at: float | None = Field(default=None, gt=0, lt=1)
    max_f1: bool = False
    precision: float | None = Field(default=None, gt=0, lt=1)
    recall: float | None = Field(default=None, gt=0, lt=1)
    cost: Cost | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"at": float(value)}
        if value == "max_f1":
            return {"max_f1": True}
        if not isinstance(value, dict | Threshold):
            raise ValueError(THRESHOLD_FORMS)
        return value

    @model_validator(mode="after")
    def _only_one(self) -> "Threshold":
        if (
            sum((self.max_f1, *(getattr(self, name) is not None for name in ("at", "precision", "recall", "cost"))))
            != 1
        ):
            raise ValueError(THRESHOLD_FORMS)
        return self

    @model_serializer
    def _to_short(self) -> Any:
        """Return it as it is written: 0.5, max_f1, or a mapping."""
        if self.at is not None or self.max_f1:
            return self.at or "max_f1"
        if self.cost is not None:
            return {"cost": self.cost.model_dump()}
        return {"precision": self.precision} if self.recall is None else {"recall": self.recall}


class Abstain(Section):
    """When a model says that it does not know. None switches a rule off.

    `error`: at most this share of what is answered is wrong, with probability 1 - `delta`, or there is no rule.
    `coverage`: an image is too unlike those of the validation side, so that this share of images like them is answered.
    """

    error: float | None = Field(default=None, gt=0, lt=1)
    delta: float = Field(default=0.05, gt=0, lt=0.5)
    coverage: float | None = Field(default=0.95, gt=0, lt=1)

    @model_validator(mode="after")
    def _any(self) -> "Abstain":
        if self.error is None and self.coverage is None:
            raise ValueError("`error`, `coverage` or both; or no `abstain` at all")
        return self


class Export(Section):
    """The second graph, in int8. `auto`: for images of 64 x 64 and more; smaller ones take longer to be read than to
    be classified. `most_changed`: the largest share of other answers, by its upper 95 % bound; else there is none.
    """

    int8: Literal["auto", "on", "off"] = "auto"
    most_changed: float = Field(default=0.01, gt=0, lt=1)

    @field_validator("int8", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare `on` or `off` as true or false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class Train(Section):
    """The network and how it learns.

    `weights`: none | default (torchvision's hub) | a file | an s3:// or https:// URI with `weights_sha256`.
    `backbone` may be an ONNX encoder for the ways `frozen` and `knn`: a file NAME.onnx, or a URI with
    `backbone_sha256`. `output` chooses among its outputs; `preprocessing` says which pixels it wants, if there is no
    preprocessor_config.json beside it.
    `on: all` trains on train and val for a last model. `backbone_rate` and `frozen_epochs` are of the way `finetune`:
    the learning rate of the first layers as a share of the head's, and the epochs in which only the head learns.
    `monitor` is a figure of the epoch; losses are to fall, all others to rise. `solver` is of the way `frozen`: the
    head is solved to convergence (`lbfgs`), with the penalty `C` (as in scikit-learn; None: chosen), or by epochs.
    `threshold` (of binary and multilabel models) and `abstain` are tuned on the validation side when the training ends.
    """

    backbone: str = "resnet18"
    weights: str = "none"
    weights_sha256: Sha256 | None = None
    backbone_sha256: Sha256 | None = None
    output: str | None = Field(default=None, min_length=1)
    preprocessing: Literal["imagenet", "none"] | Normalisation | None = None
    way: Way = "scratch"
    solver: Literal["auto", "lbfgs", "epochs"] = "auto"
    C: float | None = Field(default=None, gt=0, le=1e6)
    on: Literal["train", "all"] = "train"
    max_epochs: int = Field(default=20, ge=1, le=10_000)
    batch_size: int = Field(default=32, ge=1, le=65_536)
    accumulate: int = Field(default=1, ge=1, le=4096)
    learning_rate: float = Field(default=1e-3, gt=0, le=10)
    backbone_rate: float = Field(default=0.1, gt=0, le=1)
    frozen_epochs: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "one_cycle", "plateau", "constant"] = "cosine"
    weight_decay: float = Field(default=1e-4, ge=0)
    dropout: Ratio = 0.0
    label_smoothing: Ratio = 0.0
    clip_norm: float | None = Field(default=None, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    imbalance: Literal["auto", "none", "weights", "sampler", "focal"] = "auto"
    augment: Literal["none", "light", "medium", "strong"] = "none"
    mixup: float = Field(default=0.0, ge=0, le=10)
    cutmix: float = Field(default=0.0, ge=0, le=10)
    patience: int = Field(default=5, ge=1)
    monitor: str = Field(default="val/loss", pattern=r"^(train|val)/[a-z][a-z0-9_]*$")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    neighbours: Neighbours = Neighbours()
    threshold: Threshold = Threshold(at=0.5)
    abstain: Abstain | None = None
    export: Export = Export()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _encoder_fits_the_rest(self) -> "Train":
        keys = [key for key in ("backbone_sha256", "output", "preprocessing") if getattr(self, key) is not None]
        if not self.is_onnx:
            if keys:
                raise ValueError(f"no `{keys[0]}` with a backbone that is known by name: only an ONNX encoder has it")
            return self
        if self.way not in WAYS_ON_EMBEDDINGS:
            raise ValueError(f"`way: frozen` or `way: knn` with {self.network_name}: nothing in an ONNX file can learn")
        if self.weights not in {"none", "default"} or self.weights_sha256:
            raise ValueError(f"`weights: none` with {self.network_name}: an ONNX file holds its own weights")
        if self.backbone.startswith(REMOTE) and not self.backbone_sha256:
            raise ValueError("`backbone_sha256` with a backbone from a URI: the sha256 that its bytes must have")
        return self

    @model_validator(mode="after")
    def _way_fits_the_rest(self) -> "Train":
        if self.way == "finetune" and self.weights == "none":
            raise ValueError("`weights: default`, a file or a URI with `way: finetune`")
        if self.weights.startswith(REMOTE) and not self.weights_sha256:
            raise ValueError("`weights_sha256` with weights from a URI: the sha256 that its bytes must have")
        if self.on == "all" and not self.monitor.startswith("train/"):
            raise ValueError("`monitor: train/accuracy` with `on: all`: there is no validation side to watch")
        if self.way in WAYS_ON_EMBEDDINGS and (self.augment != "none" or self.mixup or self.cutmix):
            raise ValueError(f"no augment, mixup or cutmix with `way: {self.way}`: it sees embeddings, not pixels")
        if self.solver == "lbfgs" and self.way != "frozen":
            raise ValueError(f"`solver: lbfgs` with `way: frozen` alone: with `way: {self.way}` there is no such head")
        needed = self.list_epoch_keys()
        if self.solver == "lbfgs" and needed:
            raise ValueError(f"no {', '.join(needed)} with `solver: lbfgs`: only `solver: epochs` does that")
        if self.C is not None and not self.solves_head:
            why = f"; {', '.join(needed)} needs `solver: epochs`" if self.way == "frozen" and needed else ""
            raise ValueError(f"`C` with `way: frozen` and `solver: lbfgs` alone{why}")
        return self

    def list_epoch_keys(self) -> list[str]:
        """Return the keys that ask for what only a training by epochs does."""
        plain = {name: field.default for name, field in type(self).model_fields.items()}
        keys = [name for name in ONLY_BY_EPOCHS if getattr(self, name) != plain[name]]
        return keys + ["precision"] * (self.precision == "bf16")

    @property
    def solves_head(self) -> bool:
        """Whether the head is solved to convergence, without epochs: the way `frozen`, unless a key asks for epochs."""
        return self.way == "frozen" and self.solver != "epochs" and not self.list_epoch_keys()

    @property
    def is_onnx(self) -> bool:
        """Whether the backbone is an ONNX encoder: a file or a URI, and not a name that a library knows."""
        return self.backbone.startswith(REMOTE) or self.backbone.lower().endswith(".onnx")

    @property
    def network_name(self) -> str:
        """The backbone's name; of an ONNX encoder that of its file, without folders and what signs a URL."""
        if not self.is_onnx:
            return self.backbone
        path = urlsplit(self.backbone).path if self.backbone.startswith(REMOTE) else self.backbone
        return Path(path).name or "encoder.onnx"

    def list_files(self, home: Path) -> list[Path]:
        """Return the files beside params.yaml that this network is read from, absolute, whether they are there or not.

        They are that of `weights`, or an ONNX encoder and the preprocessor_config.json that says what pixels it wants.
        """
        if self.is_onnx:
            if self.backbone.startswith(REMOTE):
                return []
            path = (home / Path(self.backbone).expanduser()).resolve()
            return [path, path.with_name(PREPROCESSOR)] if self.preprocessing is None else [path]
        if self.weights in {"none", "default"} or "://" in self.weights:
            return []
        return [(home / Path(self.weights).expanduser()).resolve()]

    @property
    def monitor_mode(self) -> Literal["min", "max"]:
        """Whether the monitored figure is to fall or to rise."""
        return "min" if self.monitor.endswith("loss") else "max"


class Span(Section):
    """A range of a parameter for `tune`: numbers from low to high, on a log scale if said; whole ones if both are."""

    low: float | int
    high: float | int
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Span":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low < high, and low > 0 on a log scale")
        return self


Choices = Annotated[tuple[str | int | float | bool | None, ...], Field(min_length=1), BeforeValidator(to_tuple)]


def _default_space() -> dict[str, Any]:
    return {"learning_rate": Span(low=1e-4, high=1e-2, log=True), "weight_decay": Span(low=1e-6, high=1e-2, log=True)}


class Tune(Section):
    """What `visionloop tune` tries: keys of `train`, each with a range or a list of values.

    `trials` counts all of this space, also those of earlier calls. `max_epochs` of a trial: that of `train` by default.
    `prune` stops a trial that falls behind: `median` of the others at its epoch, or `hyperband`.
    """

    trials: int = Field(default=20, ge=1, le=10_000)
    max_epochs: int | None = Field(default=None, ge=1)
    metric: str = Field(default="val/accuracy", pattern=r"^val/[a-z][a-z0-9_]*$")
    prune: Literal["none", "median", "hyperband"] = "median"
    space: dict[str, Span | Choices] = Field(default_factory=_default_space, min_length=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("space")
    @classmethod
    def _of_train(cls, space: dict[str, Any]) -> dict[str, Any]:
        for key, values in space.items():
            check_key(Train, key, (values.low, values.high) if isinstance(values, Span) else values)
            if key == "backbone" and (encoders := [v for v in values if Train.model_construct(backbone=v).is_onnx]):
                raise ValueError(f"networks known by name; {encoders[0]!r} is an ONNX encoder, which has no trials")
        return space


def check_threshold(section: Train, task: str) -> None:
    """Raise ParamsError if a threshold is asked for where the likeliest class is the answer."""
    if task == "multiclass" and section.threshold != Train().threshold:
        raise ParamsError(
            "params.yaml train.threshold",
            f"got {section.model_dump()['threshold']!r} with a multiclass task",
            "no threshold: the likeliest of more than two classes is the answer",
            "Remove the key.",
        )
