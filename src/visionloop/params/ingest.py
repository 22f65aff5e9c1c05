"""The section `ingest`: sources, sides, what is expected of the data, and the limits of one file."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from visionloop.params.section import Section, Words, to_tuple
from visionloop.params.sources import Source

Fraction = Annotated[float, Field(ge=0, le=1)]
Fractions = Annotated[
    tuple[Fraction, Fraction, Fraction] | tuple[Fraction, Fraction],
    BeforeValidator(to_tuple),
]


class Split(Section):
    """How images without a side of their own are divided. All but `on_leak` is fixed by the first version of a name.

    `hash`: fractions [train, val, test], by a hash of the image's key; an image never changes its side.
    `random`: scikit-learn's `train_test_split(shuffle=True, random_state=seed)` over the first `first` images of the
    source's order, fractions [train, test]: for comparison with tutorials, never promoted.
    `on_leak` says what happens when near duplicates lie on different sides that the sources gave themselves.
    """

    method: Literal["hash", "random"] = "hash"
    seed: int = 0
    fractions: Fractions = (0.70, 0.15, 0.15)
    first: int | None = Field(default=None, ge=2)
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
        return self.model_dump(mode="json", exclude={"on_leak"})


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
    """

    sources: Annotated[tuple[Source, ...], BeforeValidator(to_tuple)] = ()
    split: Split = Split()
    expect: Expect = Expect()
    label_map: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    corrections: str | None = Field(default=None, min_length=1)
    max_rejected_ratio: float = Field(default=0.05, ge=0, le=1)
    max_pixels: int = Field(default=50_000_000, ge=1024)
    max_file_bytes: int = Field(default=50_000_000, ge=1024)

    @model_validator(mode="after")
    def _names_are_different(self) -> "Ingest":
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"a `name` of its own for each source ({', '.join(twice)} is there twice)")
        return self
