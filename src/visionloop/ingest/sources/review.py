"""The labels that people gave images of the prediction log: answers to `visionloop review`, and feedback of clients.

Only what is accepted is yielded. An image may come into test only if it was drawn by lot: of those that were chosen for
their doubt a test side would be harder than the traffic, and what a client sends is its own choice. For the same reason
no client changes the label of a test image, and an image that was not drawn, and is like one of test, is excluded.
"""

import re
from collections.abc import Iterator
from functools import partial

from visionloop.data.acceptance import Accepted, Answered
from visionloop.data.answers import RANDOM, SUSPECTS, Asked, read_asked
from visionloop.data.prediction_log import read_request_time
from visionloop.errors import ImageError, ObjectMissing, SourceError
from visionloop.ingest.item import Item, SourceContext
from visionloop.params import FeedbackSource, ReviewSource


def read_review(source: ReviewSource, context: SourceContext) -> Iterator[Item]:
    """Yield the images whose labels people gave who were asked, and those of suspects that have another label now."""
    return _read(
        source, context, "`visionloop review` asks for some; `visionloop review --accept` accepts what is held"
    )


def read_feedback(source: FeedbackSource, context: SourceContext) -> Iterator[Item]:
    """Yield the images that the server kept and whose labels came as feedback."""
    if context.answered and (number := context.answered.count_on_test()):
        todo = "`visionloop suspects --serve` asks people"
        context.tell(
            f"source {source.name}: {number:,} labels of clients are of test images, which keep theirs: {todo}"
        )
    return _read(source, context, "`visionloop review --accept` accepts feedback on images that the server kept")


def _read(source: ReviewSource | FeedbackSource, context: SourceContext, todo: str) -> Iterator[Item]:
    answered = context.answered
    if answered is None:
        raise SourceError(f"source {source.name}", "is read without a store", "a pull of a workspace")
    labels = answered.choose([source.kind])
    if not labels:
        context.tell(f"source {source.name}: no label is accepted yet: {todo}")
    for one in labels:
        if one.kind != SUSPECTS or one.sha256 in answered.sides:  # a suspect that was taken out is not brought back
            yield _make_item(source.name, one, answered)


def _make_item(source: str, one: Accepted, answered: Answered) -> Item:
    is_lot = one.reason == RANDOM and one.probability is not None
    reason = f"{one.reason}@{one.probability:.4g}" if is_lot else one.reason
    asked_at, who = read_request_time(one.request_id), re.sub(r"[^\w.@+ -]", "_", "+".join(one.who))
    return Item(
        origin=f"{source}:{who}/{reason}/{one.sha256[:16]}",
        source=source,
        labels=one.labels,
        read=partial(_read_bytes, answered, one),
        stamp=one.sha256,
        test_is_given=not is_lot and one.kind != SUSPECTS,
        excluded_near_test=not is_lot,
        captured_at=asked_at.isoformat() if asked_at else None,
    )


def _read_bytes(answered: Answered, one: Accepted, max_bytes: int) -> bytes:
    try:
        data = read_asked(answered.store, answered.name, Asked(one.sha256, one.day, "", (), 0.0, ""))
    except ObjectMissing as exc:
        raise ImageError(one.sha256[:12], "is gone from the store", "its bytes", reason_code="gone") from exc
    if len(data) > max_bytes:
        raise ImageError(one.sha256[:12], "is too large", f"at most {max_bytes} bytes", reason_code="too_large")
    return data
