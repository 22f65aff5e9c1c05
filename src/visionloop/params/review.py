"""The section `review` of params.yaml: which images people are asked about, and whose labels count: docs/loop.md."""

from typing import Annotated

from pydantic import Field

from visionloop.params.section import Section, Words


class Review(Section):
    """What `visionloop review` asks, and what of the answers may enter the dataset.

    A batch has `count` images of the last `days` of the log. The share `random` of it is drawn by lot: only these may
    come into test. Answers wait until somebody accepts them, but those of the people in `accept_at_once`, who were
    asked on the page or by a CSV. Of one client at most `client_quota` labels a day are accepted of its feedback.
    """

    count: int = Field(default=50, ge=1, le=10_000)
    days: int = Field(default=14, ge=1, le=366)
    random: Annotated[float, Field(ge=0, le=1)] = 0.2
    seed: int = Field(default=0, ge=0)
    accept_at_once: Words = ()
    client_quota: int = Field(default=100, ge=0, le=1_000_000)
