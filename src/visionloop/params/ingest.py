"""The section `ingest`: sources, sides, what is expected of the data, and the limits of one file.

Paths are relative to the workspace. Text like `${NAME}` in a URL or a header is taken from the environment, so that no
password is in params.yaml. How a source is read is in `ingest/sources/`, one file per kind.
"""

import codecs
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from visionloop.params.section import Name, Section, Text, Words, to_tuple
from visionloop.records import MAX_PIXELS

Fraction = Annotated[float, Field(ge=0, le=1)]
Fractions = Annotated[
    tuple[Fraction, Fraction, Fraction] | tuple[Fraction, Fraction],
    BeforeValidator(to_tuple),
]


def _check_encoding(value: object) -> object:
    try:
        if isinstance(value, str) and not codecs.lookup(value)._is_text_encoding:
            raise LookupError
    except (LookupError, ValueError) as exc:
        raise ValueError("the name of an encoding, such as utf-8, cp1252, shift_jis, gbk or cp1251") from exc
    return value


Encoding = Annotated[str, BeforeValidator(_check_encoding)]


def to_sides(value: object) -> object:
    """Return a list of sides; `train,test` is one, `none` an empty one."""
    if isinstance(value, str):
        return () if value.strip() == "none" else tuple(part.strip() for part in value.split(","))
    return to_tuple(value)


class Columns(Section):
    """Which column of a table means what; what is not named is guessed, and the guess is shown.

    `label` is one column, or several one-hot columns. `separator` splits one cell into several labels
    (`task: multilabel`); `none`: each cell is one class as written. `no_label` are texts of cells without a label
    (`NA`, in any case); `[""]`: only empty ones are. `sides` are those that 0, 1, 2 mean in the column of sides; `[]`:
    numbers are no sides. A key of nested JSON is written with dots: `image.url`.
    """

    image: Text | None = None
    label: Text | Words | None = None
    side: Text | None = None
    group: Text | None = None
    time: Text | None = None
    separator: Text | None = None
    sides: Annotated[tuple[Literal["train", "val", "test"], ...], BeforeValidator(to_sides)] | None = None
    no_label: Annotated[tuple[str, ...], BeforeValidator(to_tuple)] | None = None


class FolderSource(Section):
    """A folder per class, with or without split folders above them; or flat files, labelled by `pattern`.

    In a pattern `{label}`, `{side}` and `{group}` stand for what they name, `{number}` for digits and `*` for anything:
    `{label}.*.jpg`, `{label}_{number}`; one that ends with `/` names the folders: `{side}/{label}/`. The images of
    `unlabelled` folders come in for prediction only. `columns` and `encoding` are those of tables in split
    folders.
    """

    kind: Literal["folder"]
    path: Text
    name: Name = "folder"
    pattern: Text | None = None
    columns: Columns = Columns()
    encoding: Encoding | None = None
    unlabelled: Words = ()


class TableSource(Section):
    """CSV, Parquet, JSON or JSON lines: one row an image, by path or URL. Images lie in `images`, or are guessed.

    `unlabelled` folders come in without labels, for prediction only. URLs are fetched from `hosts` alone. `encoding`
    is that of its text; without it what is not UTF-8 is guessed by how it reads, and told or asked about.
    """

    kind: Literal["table"]
    path: Text
    name: Name = "table"
    images: Text | None = None
    encoding: Encoding | None = None
    columns: Columns = Columns()
    unlabelled: Words | None = None
    hosts: Words = ()


class ArchiveSource(Section):
    """A zip of class folders, of flat files (`pattern`), or of a table (`table`, inside it) and its images.

    `encoding` is that of names in the zip, and of a table, that are not UTF-8: gbk, cp866, shift_jis.
    """

    kind: Literal["archive"]
    path: Text
    name: Name = "archive"
    pattern: Text | None = None
    unlabelled: Words = ()
    encoding: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,30}$")] | None = None
    table: Text | None = None
    images: Text | None = None
    columns: Columns = Columns()


class SqlSource(Section):
    """A query of any database that SQLAlchemy reads: one row an image, by path, URL or blob.

    Read-only. With `cursor`, a column that grows, a later pull asks only for rows above the last value seen.
    """

    kind: Literal["sql"]
    url: Text
    query: Text
    name: Name = "sql"
    columns: Columns = Columns()
    cursor: Text | None = None
    images: Text | None = None
    hosts: Words = ()
    timeout_s: float = Field(default=60.0, gt=0)
    max_rows: int = Field(default=1_000_000, ge=1)
    chunk_rows: int = Field(default=1000, ge=1, le=100_000)


class HttpSource(Section):
    """A listing in JSON or CSV over HTTP, page by page, then the images it names.

    `items` is the key of the list (dots for nesting; none: the answer is the list). Pages follow by one of `next` (key
    of the next link; a `Link` header works without), `page` (the query parameter that counts 1, 2, ...), or `cursor`
    (`[key in the answer, query parameter]`). `headers` may hold `${NAME}` of the environment. Hosts other than the
    listing's own must be in `hosts`; they get no headers.
    """

    kind: Literal["http"]
    url: Text
    name: Name = "http"
    columns: Columns = Columns()
    items: Text | None = None
    next: Text | None = None
    page: Text | None = None
    cursor: Annotated[tuple[Text, Text], BeforeValidator(to_tuple)] | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    hosts: Words = ()
    requests_per_s: float = Field(default=20.0, gt=0)
    timeout_s: float = Field(default=30.0, gt=0)
    max_pages: int = Field(default=10_000, ge=1)

    @model_validator(mode="after")
    def _one_way_to_the_next_page(self) -> "HttpSource":
        if sum(way is not None for way in (self.next, self.page, self.cursor)) > 1:
            raise ValueError("one of `next`, `page` and `cursor`")
        return self


class BucketSource(Section):
    """A prefix of an S3 bucket: a folder per class, flat keys by `pattern`, or a `table` (a key below the prefix).

    Objects are pinned by version id or ETag. A later pull reads only what is new or changed.
    """

    kind: Literal["bucket"]
    path: Annotated[str, Field(pattern=r"^s3://[a-z0-9][a-z0-9.-]+(/.*)?$")]
    name: Name = "bucket"
    pattern: Text | None = None
    unlabelled: Words = ()
    table: Text | None = None
    columns: Columns = Columns()
    encoding: Encoding | None = None
    endpoint_url: Text | None = None


class VideoSource(Section):
    """Frames of a video file, a folder of them, or a camera (rtsp://, http://, a device) watched for `watch_s`.

    A frame every `every_s` seconds, or at each change of scene (`scene`: mean difference of grey levels, 0 to 1).
    Labelled by the folder of the file (`pattern` and `unlabelled` as of a folder), by `label`, or by `table` (columns:
    image = file; start, end in seconds are optional). Each video is one group.
    """

    kind: Literal["video"]
    path: Text
    name: Name = "video"
    label: Text | None = None
    pattern: Text | None = None
    unlabelled: Words = ()
    table: Text | None = None
    columns: Columns = Columns()
    every_s: float = Field(default=1.0, gt=0)
    scene: float | None = Field(default=None, gt=0, lt=1)
    watch_s: float = Field(default=60.0, gt=0)
    max_frames: int = Field(default=10_000, ge=1)
    max_video_s: float = Field(default=4 * 3600.0, gt=0)
    max_video_bytes: int = Field(default=20_000_000_000, ge=1024)
    hosts: Words = ()


class PythonSource(Section):
    """A function of your own, `module:function`, that yields records: the door for anything else.

    It is called with `options`; the module lies in the workspace or is installed.
    """

    kind: Literal["python"]
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    name: Name = "python"
    options: dict[str, Any] = Field(default_factory=dict)
    images: Text | None = None
    hosts: Words = ()


class DigitsSource(Section):
    """scikit-learn's 1,797 handwritten digits, written as PNG files into class folders."""

    kind: Literal["digits"]
    name: Name = "digits"


class ReviewSource(Section):
    """What people answered to `visionloop review` and `visionloop suspects --serve`, as far as it is accepted."""

    kind: Literal["review"]
    name: Name = "review"


class FeedbackSource(Section):
    """What clients said of answered images (`POST /feedback`), as far as it is accepted: for train and val alone."""

    kind: Literal["feedback"]
    name: Name = "feedback"


Source = Annotated[
    FolderSource
    | TableSource
    | ArchiveSource
    | SqlSource
    | HttpSource
    | BucketSource
    | VideoSource
    | PythonSource
    | DigitsSource
    | ReviewSource
    | FeedbackSource,
    Field(discriminator="kind"),
]


class Split(Section):
    """How images without a side of their own are divided. Method, seed and fractions are fixed by the first version.

    `hash`: fractions [train, val, test], by a hash of the image's key; an image never changes its side. The first
    version is divided class by class. The first `min_train` keys of a class go to train, whatever their hash says.
    `random`: scikit-learn's `train_test_split(shuffle=True, random_state=seed)` over the first `first` images of the
    source's order, fractions [train, test]: for comparison with tutorials, never promoted.
    `on_leak` says what happens when near duplicates lie on different sides that the sources gave themselves.
    """

    method: Literal["hash", "random"] = "hash"
    seed: int = 0
    fractions: Fractions = (0.70, 0.15, 0.15)
    first: int | None = Field(default=None, ge=2)
    min_train: int = Field(default=1, ge=0)
    on_leak: Literal["report", "exclude", "fail"] = "report"

    @model_validator(mode="after")
    def _fractions_fit(self) -> "Split":
        if abs(sum(self.fractions) - 1) > 1e-6 or min(self.fractions[0], self.fractions[-1]) <= 0:
            raise ValueError("fractions [train, val, test] that sum to 1, train and test above 0")
        if (self.method == "random") != (len(self.fractions) == 2):
            raise ValueError("three fractions [train, val, test] with `method: hash`, two [train, test] with `random`")
        if self.first is not None and self.method != "random":
            raise ValueError("`first` only with `method: random`")
        return self

    def fixed(self) -> dict[str, Any]:
        """Return what version 1 of a name fixes."""
        return self.model_dump(mode="json", exclude={"on_leak", "min_train"})


class Expect(Section):
    """What must hold of the whole dataset before a version is made of it. None and 0: anything goes.

    `classes` are all the classes there may be. `size_px` is [shortest side, longest side] of every image.
    `max_imbalance` is the largest class over the smallest. `sources` are the names that may deliver.
    """

    classes: Words | None = None
    min_per_class: int = Field(default=0, ge=0)
    size_px: Annotated[tuple[int, int], BeforeValidator(to_tuple)] | None = None
    sources: Words | None = None
    max_imbalance: float | None = Field(default=None, ge=1)


class Ingest(Section):
    """Where images come from, and what is asked of them.

    `label_map` renames labels (old: new). `corrections` is a CSV (sha256, old, new), applied at each pull.
    `convert` makes PNGs of TIFF, BMP, GIF and PPM.
    """

    sources: Annotated[tuple[Source, ...], BeforeValidator(to_tuple)] = ()
    split: Split = Split()
    expect: Expect = Expect()
    label_map: dict[Text, Text] = Field(default_factory=dict)
    corrections: str | None = Field(default=None, min_length=1)
    max_rejected_ratio: float = Field(default=0.05, ge=0, le=1)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1024)
    max_file_bytes: int = Field(default=50_000_000, ge=1024)
    convert: bool = False

    @model_validator(mode="after")
    def _names_are_different(self) -> "Ingest":
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"a `name` of its own for each source ({', '.join(twice)} is there twice)")
        return self
