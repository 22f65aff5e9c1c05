"""params.yaml as frozen, validated objects: what changes results. Where it runs is in `settings.py`.

An unknown key, a wrong type or a value out of range is a `ParamsError` that names the key.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError

from visionloop.errors import ParamsError, shorten
from visionloop.params.gate import Floor, Gate
from visionloop.params.ingest import (
    ArchiveSource,
    BucketSource,
    Columns,
    DigitsSource,
    Expect,
    FeedbackSource,
    FolderSource,
    HttpSource,
    Ingest,
    PythonSource,
    ReviewSource,
    Source,
    Split,
    SqlSource,
    TableSource,
    VideoSource,
)
from visionloop.params.loop import Monitor, Predict, Review, Schedule, Triggers
from visionloop.params.section import NAME_PATTERN, Section, to_tuple
from visionloop.params.text import MAX_CHARS, parse_yaml
from visionloop.params.train import (
    WAYS_ON_EMBEDDINGS,
    Embed,
    Span,
    Train,
    Tune,
)
from visionloop.records import compute_digest
from visionloop.secrets import mask

__all__ = [
    "WAYS_ON_EMBEDDINGS",
    "ArchiveSource",
    "BucketSource",
    "Columns",
    "Compute",
    "DigitsSource",
    "Evaluate",
    "Expect",
    "FeedbackSource",
    "Floor",
    "FolderSource",
    "Gate",
    "HttpSource",
    "Ingest",
    "KeepImages",
    "Monitor",
    "Params",
    "Predict",
    "Prepare",
    "PythonSource",
    "Review",
    "ReviewSource",
    "Serve",
    "Source",
    "Span",
    "Split",
    "SqlSource",
    "TableSource",
    "Train",
    "Triggers",
    "VideoSource",
    "load_params",
    "make_params",
]

ALIKE = 0.85  # how near a key must be to be meant rather than others (difflib's ratio)

HOST_PATTERN = r"^(\*|(\*\.)?[a-z0-9_.:-]+)$"
ORIGIN_PATTERN = r"^(\*|https?://[a-z0-9_.\[\]:-]+)$"
Side = Annotated[int, Field(ge=32, le=4096)]
KINDS = "|".join(
    ("folder", "table", "archive", "sql", "http", "bucket", "video", "python", "digits", "review", "feedback")
)


class Prepare(Section):
    """How bytes become arrays. `image_size` is S or [height, width].

    `train_size` stores the train side larger, for random crops of `image_size`. `limit` takes a stable subset of about
    so many images, in the proportions of sides and classes, for quick experiments. `unlabelled` says what an image
    without a label is with `task: multilabel`: left out, or a negative of every class.
    """

    image_size: Side | Annotated[tuple[Side, Side], BeforeValidator(to_tuple)] = 224
    resize: Literal["squash", "fit_crop", "letterbox"] = "squash"
    train_size: Side | Annotated[tuple[Side, Side], BeforeValidator(to_tuple)] | None = None
    limit: int | None = Field(default=None, ge=2)
    unlabelled: Literal["exclude", "negative"] = "exclude"

    @property
    def size_hw(self) -> tuple[int, int]:
        """The size as (height, width)."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


class Evaluate(Section):
    """How figures get their intervals, and how many training images the baselines of the report learn from."""

    resamples: int = Field(default=2000, ge=100, le=100_000)
    seed: int = 0
    baseline_images: int = Field(default=512, ge=0)


class KeepImages(Section):
    """Which answered images the server keeps; the row of each says how likely it was kept.

    `confidence`: all below it. `novel`: all farther from the validation images than this share of them is from the
    others. `random`: this share of all. Above `per_hour` images an hour the probabilities are lowered.
    """

    confidence: float | None = Field(default=None, gt=0, le=1)
    novel: float | None = Field(default=None, ge=0.5, lt=1)
    random: float = Field(default=0.0, ge=0, le=1)
    per_hour: int = Field(default=360, ge=1, le=1_000_000)


class Serve(Section):
    """Limits of the server. `max_pixels`: decoded of one image; the model's own limit on its size holds beside it.

    `max_video_bytes`, `max_video_s`: of a video that is sent to /predict/video.
    `cache_mb`: memory for answers to images that come again; 0: none is kept.
    `deadline_s`: a request that takes longer is answered 503; a client may ask for less by the header X-Deadline-Ms.
    `stuck_s`: a batch that takes longer is taken for stuck: /health/live is 503, and the process is to be replaced.
    `lame_duck_s`: how long it still answers after SIGTERM, when it is not ready any more.
    `keep_alive_s`: how long a connection may wait for its next request; longer than a balancer before it waits.
    `hosts`: the names it is asked by, `*` for any; None: this machine's names where no other reaches it, else any.
    `cors`: origins whose pages may ask it. `rate_per_s`: images a second of each key, or of each address without keys.
    `admin_port`: where /metrics and /admin are, and nothing else is. `log_format`: json has a line for each request.
    `log`: whether answers are written down, every `log_flush_s`, with the `log_top_k` likeliest classes and for the
    share `log_embeddings` of them the embedding; for `log_days` days (null: for ever). `keep_images`: which images are
    kept too. `feedback_per_minute`: of each client.
    `threads` of the network; 0: the cores that the process may use, by affinity and cgroup. `runtime: auto`: the
    fastest engine that is approved for the model, or `onnxruntime` in fp32.
    """

    max_body_bytes: int = Field(default=20_000_000, ge=1024)
    max_pixels: int | None = Field(default=16_000_000, ge=1024)
    max_video_bytes: int = Field(default=200_000_000, ge=1024)
    max_video_s: float = Field(default=600.0, gt=0, le=86_400)
    cache_mb: int = Field(default=32, ge=0, le=100_000)
    max_batch: int = Field(default=32, ge=1)
    max_queue: int = Field(default=256, ge=1)
    deadline_s: float = Field(default=30.0, gt=0, le=3600)
    poll_s: float = Field(default=5.0, gt=0)
    stuck_s: float = Field(default=60.0, gt=0, le=3600)
    lame_duck_s: float = Field(default=5.0, ge=0, le=3600)
    keep_alive_s: int = Field(default=75, ge=1, le=86_400)
    max_connections: int = Field(default=1000, ge=1, le=100_000)
    hosts: Annotated[tuple[Annotated[str, Field(pattern=HOST_PATTERN)], ...], BeforeValidator(to_tuple)] | None = None
    cors: Annotated[tuple[Annotated[str, Field(pattern=ORIGIN_PATTERN)], ...], BeforeValidator(to_tuple)] = ()
    rate_per_s: float | None = Field(default=None, gt=0, le=1_000_000)
    admin_port: int | None = Field(default=None, ge=1, le=65_535)
    log_format: Literal["text", "json"] = "text"
    log: bool = True
    log_flush_s: float = Field(default=30.0, gt=0, le=3600)
    log_top_k: int = Field(default=5, ge=1, le=1000)
    log_embeddings: float = Field(default=1.0, ge=0, le=1)
    log_days: int | None = Field(default=90, ge=1, le=36_500)
    keep_images: Literal["none"] | KeepImages = "none"
    feedback_per_minute: int = Field(default=600, ge=1, le=1_000_000)
    threads: int = Field(default=0, ge=0, le=1024)
    runtime: Literal["auto", "onnxruntime"] = "auto"


class Compute(Section):
    """Where the work runs, and what is shown of it. Nothing here makes a stage run again.

    `engine`: `prepare` and `predict --out` here, or on a Ray cluster at `address`. `accelerator`, `strategy`,
    `devices` a node and `num_nodes`: what a training runs on; each run records what it came to. `tensorboard` writes
    its files beside MLflow; `confusion_every` so many epochs MLflow gets the confusion of the validation side.
    """

    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    strategy: Literal["auto", "ddp", "ray"] = "auto"
    devices: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    num_nodes: int = Field(default=1, ge=1, le=1024)
    tensorboard: bool = False
    confusion_every: int = Field(default=0, ge=0)


class Params(Section):
    """The whole of params.yaml.

    `task: auto` is binary with two classes, else multiclass; `multilabel` lets an image have several labels.
    """

    name: str = Field(pattern=NAME_PATTERN)
    task: Literal["auto", "binary", "multiclass", "multilabel"] = "auto"
    ingest: Ingest = Ingest()
    prepare: Prepare = Prepare()
    embed: Embed = Embed()
    train: Train = Train()
    tune: Tune = Tune()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    serve: Serve = Serve()
    predict: Predict = Predict()
    monitor: Monitor = Monitor()
    review: Review = Review()
    triggers: Triggers = Triggers()
    schedule: Schedule = Schedule()
    compute: Compute = Compute()

    def digest(self, made_with: Mapping[str, Any] | None = None) -> str:
        """Digest of the sections that change a model or a verdict; `made_with`: sections that stand for those here."""
        sections = ("prepare", "embed", "train", "evaluate", "gate")
        values = {name: getattr(self, name).model_dump(mode="json") for name in sections}
        values |= {name: value for name, value in (made_with or {}).items() if name in values}
        return compute_digest([self.task, values])


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParamsError: it is missing, is no YAML mapping, has a key twice, or has unknown keys or bad values.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARS + 1)
    except FileNotFoundError as exc:
        raise ParamsError(
            str(path), "not found", "a params.yaml", "Make a workspace with `visionloop new DIR`."
        ) from exc
    except UnicodeDecodeError as exc:
        raise ParamsError(path.name, f"is not UTF-8 ({exc.reason})", "keys and values", "Edit the file.") from exc
    value = parse_yaml(text, path.name)
    if not isinstance(value, dict):
        raise ParamsError(path.name, f"holds a {type(value).__name__}", "sections with keys", "Edit the file.")
    return make_params(value, path.name)


def make_params(value: dict[str, Any], where: str = "params.yaml") -> Params:
    """Check a decoded params.yaml. Raises ParamsError."""
    try:
        params = Params.model_validate(value)
    except ValidationError as exc:
        raise _translate(exc, where) from exc
    if params.evaluate.resamples < (least := params.gate.count_resamples()):
        found = f"got {params.evaluate.resamples} with gate.metric: macro_f1 and gate.alpha: {params.gate.alpha:g}"
        expected = f"an integer >= {least} (20 / alpha: fewer tell too little of the tail)"
        raise ParamsError(f"{where} evaluate.resamples", found, expected, "Edit the file.")
    return params


def _translate(exc: ValidationError, where: str) -> ParamsError:
    errors = sorted(exc.errors(include_url=False), key=lambda e: [str(part) for part in e["loc"]])
    first = errors[0]
    # Tags of unions are not keys of the file: a size that fits neither form is one problem, not two.
    sections = {one.__name__ for one in _list_sections(Section)}
    forms = rf"^(constrained-|tuple|function-|({KINDS}|{'|'.join(sections)})$)"
    keys = [str(p) for p in first["loc"] if not re.match(forms, str(p))]
    depth = next((place for place, part in enumerate(first["loc"]) if part in sections), len(keys))
    kind, message = first["type"], first["msg"]
    if kind == "extra_forbidden" and first["loc"] in {("train", key) for key in Compute.model_fields}:
        found, expected = "stands in another section", f"compute.{keys[-1]}"
    elif kind == "extra_forbidden":
        found, expected = "unknown key", _known_keys(first["loc"])
    elif keys[-1] == "[key]":
        keys.pop()
        found, expected = "unknown key", _find_near(keys[-1], re.findall(r"'(\w+)'", first["ctx"]["expected"]))
    elif kind == "missing":
        found, expected = "missing", "a value"
    elif kind == "union_tag_invalid":
        keys.append("kind")
        found, expected = f"got {first['ctx']['tag']!r}", f"one of {first['ctx']['expected_tags']}"
    elif kind == "string_type":
        found, expected = f"got {first['input']!r}"[:120], f'text: write it in quotes, "{first["input"]}"'[:120]
    elif kind == "string_pattern_mismatch":
        found = f"got {first['input']!r}"
        is_digest = keys[-1].endswith("sha256")
        expected = "64 digits and letters a to f" if is_digest else "lower-case letters, digits and '-' (at most 63)"
    else:
        found = f"got {first['input']!r}"[:120]
        expected = _explain(first) or re.sub(r"^(Input should be (a valid )?|Value error, )", "", message)
    same = [e for e in errors if e["loc"][:depth] == first["loc"][:depth]]  # the other forms of this value
    words = [e["ctx"]["expected"] for e in same if e["type"] == "literal_error"]
    if words and kind == "model_type":
        expected = f"{words[0]}, or {expected}"
    others = len(errors) - len(same)
    more = f" ({others} more in the file)" if others else ""
    return ParamsError(f"{where} {'.'.join(keys)}".strip(), mask(found), mask(expected), f"Edit the file{more}.")


def _explain(error: Any) -> str:
    """Say in the words of YAML what a section or a list looks like; "" for any other value."""
    if error["type"] == "tuple_type":
        return "a list: [a, b]"
    if error["type"] != "model_type":
        return ""
    section = next((one for one in _list_sections(Section) if one.__name__ == error["ctx"]["class_name"]), None)
    return f"keys below it: {shorten([*section.model_fields], 8)}" if section else "keys below it"


def _list_sections(section: type[Section]) -> Iterator[type[Section]]:
    for one in section.__subclasses__():
        yield one
        yield from _list_sections(one)


def _known_keys(loc: tuple[int | str, ...]) -> str:
    """Return the keys that an unknown one is meant to be: a like one here or in another section, else all of here."""
    here = {_plain(name): name for name in _find_fields(Params, loc[:-1])}
    elsewhere: dict[str, list[str]] = defaultdict(list)
    for section in Params.model_fields:
        for name in _find_fields(Params, (section,)):
            elsewhere[_plain(name)].append(f"{section}.{name}")
    wanted = _plain(str(loc[-1]))
    near = [here[key] for key in difflib.get_close_matches(wanted, here, cutoff=ALIKE)]
    alike = difflib.get_close_matches(wanted, elsewhere, cutoff=ALIKE)
    near = near or [name for key in alike for name in elsewhere[key]]
    near = near or [here[key] for key in difflib.get_close_matches(wanted, here, cutoff=0.5)]
    known = near or sorted(here.values())
    return f"{'one of ' * (len(known) > 1)}{', '.join(known)}" if known else "the documented keys"


def _find_near(wanted: str, known: Sequence[str]) -> str:
    """Return the name that is meant, or all of them."""
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=ALIKE)
    return near[0] if near else f"one of {shorten([*known], len(known))}"


def _plain(key: str) -> str:
    """Return a key without its dividers: `batchsize` is as good as `batch_size`."""
    return re.sub(r"[_\W]", "", key.lower())


def _find_fields(model: Any, path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of a section, such as ("ingest", "sources", 0, "folder"); none if it has no fixed ones."""
    kinds = {get_args(one.model_fields["kind"].annotation)[0]: one for one in get_args(get_args(Source)[0])}
    sections = {one.__name__: one for one in _list_sections(Section)}
    before: int | str = ""
    for part in path:
        if not isinstance(part, int):
            field = getattr(model, "model_fields", {}).get(part)
            other = sections.get(part, field.annotation if field else None)  # one form of several has its own name
            model = kinds.get(part) if isinstance(before, int) else other
        before = part
    return list(getattr(model, "model_fields", {}))
