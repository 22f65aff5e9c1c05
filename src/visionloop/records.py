"""The values that the parts hand to each other: plain, frozen, JSON-ready. No disk, no network.

Dimensions in names: n images, k classes, d embedding size.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

SIDES = ("train", "val", "test", "excluded")
MAX_PIXELS = 50_000_000  # of an image, where `ingest.max_pixels` says nothing else
LABEL_SEPARATOR = "|"  # between several labels of an image, where they are one text
CARD_SCHEMA = (
    2  # of `Card`; a higher one is refused: this code would pass over what it adds. 2: biases, abstain, tuning
)


def canonical_json(value: object) -> bytes:
    """Encode a JSON value so that equal values give equal bytes (sorted keys, no spaces)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def compute_digest(value: object) -> str:
    """Return the sha256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def measure_width(text: str) -> int:
    """Return how many columns of a terminal a text takes: Chinese, Japanese and Korean characters take two."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


# What a formula begins with in a spreadsheet; the last four are the wide forms of the first four.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def defuse_cell(text: str) -> str:
    """Keep a spreadsheet from running a text as a formula, in a column that nobody reads back."""
    return f"'{text}" if text.startswith(FORMULA) else text


def encode_line(value: object) -> str:
    """Return JSON as one line that a terminal only shows: text as it is, what is not printable as `\\u001b`."""
    line = json.dumps(value, ensure_ascii=False)
    return line if line.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def make_natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return what names are sorted by, as people count: `2` before `10`, and `class 2` before `class 10`."""
    parts = [(part.isdecimal(), part.lstrip("0") if part.isdecimal() else part) for part in re.split(r"(\d+)", name)]
    return [(int(not number), len(text) if number else 0, text) for number, text in parts if text or number]


@dataclass(frozen=True, slots=True)
class Record:
    """Base class of records stored as JSON. Unknown keys are ignored, so older code can read newer files."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build a record from a decoded JSON object; lists become tuples."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k in known})

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-ready builtins."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ImageRecord(Record):
    """One image of a dataset: one row of the manifest, identified by the sha256 of its bytes.

    `key` decides the side: the group, else the key of its near duplicates, else the sha256. `phash` is a 64-bit
    perceptual hash in hex, empty if a side is below 32 px.
    """

    sha256: str
    labels: tuple[str, ...]
    sources: tuple[str, ...]
    origins: tuple[str, ...]
    ordinal: int
    group: str | None
    key: str
    side: str
    captured_at: str | None
    width: int
    height: int
    format: str
    num_bytes: int
    phash: str


@dataclass(frozen=True)
class Rejected(Record):
    """One quarantined file: where it came from, a stable code, and the reason in words.

    `is_row`: it is a row of a table, a query or a listing that leads to no file.
    """

    origin: str
    code: str
    reason: str
    is_row: bool = False


@dataclass(frozen=True)
class DatasetVersion(Record):
    """The commit object of one dataset version. `parts` are digests of manifests; rows of later parts replace earlier.

    `counts` is side -> class -> images. `rejected` is the digest of the quarantine list of the pull that made it, and
    `num_rejected` how many lines of it are of what cannot be used; `leaks` is the digest of its leak report. `cursors`
    says how far each incremental source has been read. `aside` is the digest of a manifest of images that were taken
    out, with the sides they had; the classes `left_out` are among them.
    """

    name: str
    version: int
    digest: str
    parent: int | None
    parts: tuple[str, ...]
    num_images: int
    num_added: int
    classes: tuple[str, ...]
    counts: dict[str, dict[str, int]]
    sources: tuple[str, ...]
    split: dict[str, Any]
    rejected: str | None
    num_rejected: int
    created_at: str
    cursors: dict[str, str] = field(default_factory=dict)
    leaks: str | None = None
    num_leaks: int = 0
    aside: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pin(Record):
    """`data/dataset.json`: the one dataset version that a workspace uses. It is kept in git and holds no time."""

    name: str
    version: int
    digest: str
    num_images: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Card(Record):
    """`card.json` of a bundle: all that is needed to use the model, and its origin. No time, no run id.

    `threshold` is the probability of `classes[1]` from which a binary model answers `classes[1]`; None otherwise.
    `thresholds` are, by class, the probabilities from which a multilabel model gives that label; None otherwise.
    `dataset` holds name, version, digest. `parity` is the largest |torch - ONNX| logit difference at export.
    `max_pixels` is the limit on an image: that of the ingest.

    Logits become probabilities as logits / `temperature` + `biases` (by class; None: none). `abstain` says when the
    model does not know: below which `confidence`, beyond which `distance` to the `neighbours`-th nearest validation
    image; either may be None. `tuning` says what all this was fitted on and what it brought; None: nothing was tried.

    `runtimes` are the engines that give the same answers often enough (`onnxruntime fp32`; in older cards without the
    precision). `engines` says of each other one that was tried what was found; None: none was.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    resize: str
    temperature: float
    threshold: float | None
    runtimes: tuple[str, ...]
    dataset: dict[str, Any]
    params: dict[str, Any]
    network: dict[str, Any]
    parity: float
    schema: int = CARD_SCHEMA
    thresholds: dict[str, float] | None = None
    max_pixels: int = MAX_PIXELS
    biases: dict[str, float] | None = None
    abstain: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    engines: dict[str, Any] | None = None


@dataclass(frozen=True)
class Interval(Record):
    """A figure with its 95 % interval. The bounds are None where there are too few images to tell, and for ece."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Prediction(Record):
    """The answer for one image: the class, all probabilities by class name, and the probability of the answer.

    A multilabel model answers with `labels`, any number of them, in the order of its classes. `prediction` is then
    these names joined by `|`. `confidence` is the probability of the whole answer if labels are independent: the
    product over all classes of p for a given label and 1 - p for one not given. For other tasks `labels` is None, and
    not in the JSON.

    `abstained` says in words why the model does not know; `prediction` is then its best guess. None: it answers.
    """

    prediction: str
    probabilities: dict[str, float]
    confidence: float
    labels: tuple[str, ...] | None = None
    abstained: str | None = None

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if self.labels is None:
            del value["labels"]
        return value


@dataclass(frozen=True)
class RuleResult(Record):
    """The result of one rule of the gate. `passed` is None if it cannot be told, or if a person has to say.

    `value` with its bounds `low` and `high` is held against `line`; None where the rule has no such number. With the
    mode `dry_run` a rule is shown, but decides nothing.
    """

    rule: str
    passed: bool | None
    found: str
    expected: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    line: float | None = None
    mode: str = "on"

    @property
    def holds_back(self) -> bool:
        """Whether the candidate does not pass because of this rule."""
        return self.mode == "on" and not self.passed


@dataclass(frozen=True)
class Decision(Record):
    """What the gate decided, for which models, by which rules. Every decision is stored, also a refusal.

    `verdict` is passed, refused, inconclusive or waiting (for a person to approve). `state` holds the digests that
    "nothing changed" compares: dataset, params, code, weights. `champion` is None when there was none. `entry` is the
    number of the ledger entry that it was compared with: 0 when there was none, None in decisions from before it was
    noted. `num_keys` counts the groups of test images (one image is a group too). `looks`: it was the so-many-th
    candidate against this entry.
    """

    name: str
    number: int
    verdict: str
    candidate: str
    champion: str | None
    test_digest: str
    num_test: int
    rules: tuple[RuleResult, ...]
    metrics: dict[str, dict[str, float | None]]
    champion_metrics: dict[str, dict[str, float | None]]
    state: dict[str, str]
    dataset: dict[str, Any]
    run_id: str | None
    decided_at: str
    entry: int | None = None
    num_keys: int | None = None
    looks: int = 0

    @property
    def is_same_model(self) -> bool:
        """Say whether the candidate was the champion itself, so that there was nothing to compare."""
        return self.candidate == self.champion and self.verdict == "inconclusive"

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        rules = tuple(RuleResult.from_json(rule) for rule in value["rules"])
        return super().from_json({**value, "rules": rules})


@dataclass(frozen=True)
class LedgerEntry(Record):
    """One promotion (or rollback). The highest entry of a name is its champion.

    `runtimes` are the engines that `evaluate` approved for the bundle, beside ONNX Runtime in fp32; none in entries
    from before they were noted.
    """

    name: str
    number: int
    action: str
    bundle: str
    previous: str | None
    model_version: str
    decision: int | None
    dataset: dict[str, Any]
    run_id: str | None
    by: str
    why: str
    at: str
    runtimes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunNote(Record):
    """`.visionloop/runs/<bundle digest>.json`: which MLflow run, commit and time made a bundle."""

    bundle: str
    run_id: str
    git_commit: str | None
    finished_at: str
    seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
