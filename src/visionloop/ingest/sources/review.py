"""The labels that people gave images of the prediction log: answers to `visionloop review`, and feedback of clients.

Only what is accepted is yielded. An image may come into test only if it was drawn by lot: of those that were chosen for
their doubt a test side would be harder than the traffic, and what a client sends is its own choice. For the same reason
no client changes the label of a test image, and an image that was not drawn, and is like one of test, is excluded.
"""

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

from visionloop.data.acceptance import WAITS, Accepted, Answered
from visionloop.data.answers import RANDOM, SUSPECTS, Asked, load_feedback_opinions, read_asked
from visionloop.data.prediction_log import read_feedback as read_said
from visionloop.data.prediction_log import read_request_time
from visionloop.errors import ImageError, ObjectMissing, SourceError
from visionloop.ingest.item import Item, SourceContext
from visionloop.params import FeedbackSource, ReviewSource


def read_review(source: ReviewSource, context: SourceContext) -> Iterator[Item]:
    """Yield the images whose labels people gave who were asked, and those of suspects that have another label now."""
    todo = "`visionloop review` asks for some; `visionloop review --accept` accepts what is held"
    return _read(source, context, lambda _: f"no label is accepted yet: {todo}")


def read_feedback(source: FeedbackSource, context: SourceContext) -> Iterator[Item]:
    """Yield the images that the server kept and whose labels came as feedback."""
    if context.answered and (number := context.answered.count_on_test()):
        todo = "`visionloop suspects --serve` asks people"
        context.tell(
            f"source {source.name}: {number:,} labels of clients are of test images, which keep theirs: {todo}"
        )
    return _read(source, context, _explain_no_feedback)


def _explain_no_feedback(answered: Answered) -> str:
    """Say why no label of feedback is accepted."""
    since = datetime.now(UTC) - WAITS
    number = read_said(answered.store, answered.name, since).table.num_rows
    if not number:
        return f"no feedback has come in the last {WAITS.days} days"
    opinions = load_feedback_opinions(answered.store, answered.name, since)
    if not opinions:
        it = "the one feedback is not" if number == 1 else f"none of {number:,} is"
        return f"{it} a label of an image that the server kept: `serve.keep_images` in params.yaml says which it keeps"
    if all(one.is_echo for one in opinions):
        return "what came repeats the model's answers, and no name stands for it (`who`): that is no label"
    return "no label is accepted yet: `visionloop review --accept` accepts feedback on images that the server kept"


def _read(
    source: ReviewSource | FeedbackSource, context: SourceContext, explain: Callable[[Answered], str]
) -> Iterator[Item]:
    answered = context.answered
    if answered is None:
        raise SourceError(f"source {source.name}", "is read without a store", "a pull of a workspace")
    labels = answered.choose([source.kind])
    if not labels:
        context.tell(f"source {source.name}: {explain(answered)}")
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
