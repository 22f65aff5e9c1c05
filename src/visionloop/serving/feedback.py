"""`POST /feedback`: what people say that an answered image shows. An answer of 200 means that it is in the store.

The id of a request tells when it came. So feedback is taken before the answer itself is in the log, and on every server
of a name: whether there was such an answer is found out when the two are joined. Each is a row of its own; the newest
counts, the earlier ones are kept.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from visionloop.data.prediction_log import FEEDBACK, make_request_id, read_request_time
from visionloop.errors import StoreError, shorten
from visionloop.params import Serve
from visionloop.records import LABEL_SEPARATOR, Card
from visionloop.serving.access import Rates
from visionloop.serving.aside import Aside
from visionloop.serving.body import Inbox, RequestError
from visionloop.serving.schemas import FEEDBACK_BODY, FEEDBACK_ERRORS, REFUSED, FeedbackAnswer, FeedbackListAnswer
from visionloop.serving.swap import ServedModel
from visionloop.store import ObjectStore

MAX_BODY_BYTES, MAX_ITEMS, STORE_S = 500_000, 1000, 30.0
MAX_LABELS, MAX_CHARS = 1000, 200
CHECK_S = 1.0  # how long it is believed that the store is the known one
AHEAD = timedelta(minutes=5)  # how far the clocks of two servers may differ
KEYS = frozenset({"request_id", "label", "labels", "who", "allow_new"})
FORM = '{"request_id": "...", "label": "..."}'


class FeedbackBook:
    """Takes feedback into the store. `num_taken` items are there; `num_refused` could not be used."""

    def __init__(
        self, name: str, store: ObjectStore, serve: Serve, *, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` raises StoreError for a store that is not the known one; it is asked again after CHECK_S."""
        self._name, self._store = name, store
        self._check_store, self._checked_at_s = check, -math.inf
        self._keep_days = serve.log_days
        self._server, self._numbers = secrets.token_hex(4), count(1)  # several threads take one
        self._writers = Aside("feedback", 4)
        self._rates, self._per_minute = Rates("items of feedback a minute", 60.0), serve.feedback_per_minute
        self.num_taken = self.num_refused = 0

    def charge(self, client: str, number: int) -> None:
        """Count items of a client. Raises RateExceeded."""
        self._rates.take(client, self._per_minute, time.monotonic(), number)

    def check(self, item: object, card: Card, now: datetime) -> dict[str, Any]:
        """Return the row of an item, without the client. Raises RequestError."""
        if not isinstance(item, dict) or not set(item) <= KEYS:
            keys = f"the keys {shorten([str(key)[:40] for key in item])}" if isinstance(item, dict) else "no object"
            raise _bad(f"an item has {keys}", f"{FORM}; `labels`, `who` and `allow_new` are known too")
        request_id, who, allow_new = item.get("request_id"), item.get("who"), item.get("allow_new", False)
        if who is not None and not _is_text(who):
            raise _bad("`who` is no text that can be printed", f"up to {MAX_CHARS} characters")
        if not isinstance(allow_new, bool):
            raise _bad(f"`allow_new` is {allow_new!r}"[:MAX_CHARS], "true or false")
        self._check_time(request_id, now)
        labels = _read_labels(item, card)
        unknown = [label for label in labels if label not in card.classes]
        if unknown and not allow_new:
            expected, todo = f"one of {shorten(card.classes)}", "Send `allow_new`: true with a label that is new."
            raise RequestError(f"{unknown[0]!r} is no class", expected, todo, status=422, reason_code="unknown_label")
        return {"request_id": request_id, "labels": labels, "is_new": bool(unknown), "who": who}

    def write(self, rows: Sequence[Mapping[str, Any]], now: datetime) -> None:
        """Put rows into the store: when it returns they survive all but the loss of the store. Raises StoreError."""
        if time.monotonic() - self._checked_at_s > CHECK_S:
            self._check_store()
            self._checked_at_s = time.monotonic()
        part = f"{now:%H%M%S}-{self._server}-{next(self._numbers):06d}"
        key = FEEDBACK.make_key(self._name, now.date(), part)
        # Of two items of a list on one answer the later one counts: their times differ by a microsecond.
        times = [now + timedelta(microseconds=number) for number in range(len(rows))]
        ids = [make_request_id(now.timestamp()) for _ in rows]
        whole = [{**row, "feedback_id": i, "time": t} for row, i, t in zip(rows, ids, times, strict=True)]
        data = FEEDBACK.encode(whole)
        if not self._store.create(key, data):
            raise StoreError("store", f"has another {key}", "a free key")

    async def write_in_time(self, rows: Sequence[Mapping[str, Any]], now: datetime) -> None:
        """Do the same in a thread. Raises RequestError: nothing is promised, the client is to send it again."""
        try:
            async with asyncio.timeout(STORE_S):
                await self._writers.run(partial(self.write, rows, now))
        except (StoreError, TimeoutError) as exc:
            found = "the store does not take it now"
            raise RequestError(found, todo="Send it again.", status=503, reason_code="store_away") from exc
        self.num_taken += len(rows)

    def _check_time(self, request_id: object, now: datetime) -> None:
        if not isinstance(request_id, str):
            raise _bad("an item has no text as its `request_id`")
        asked_at = read_request_time(request_id)
        if asked_at is None or asked_at > now + AHEAD:
            found, expected = f"{request_id[:60]!r} is no request id of this server", "one of an answer"
            raise RequestError(found, expected, status=404, reason_code="unknown_request")
        if self._keep_days is not None and asked_at < now - timedelta(days=self._keep_days):
            found, expected = f"the answer is of {asked_at:%Y-%m-%d}", f"one of the last {self._keep_days} days"
            raise RequestError(found, expected, status=404, reason_code="too_old")


def add_feedback(app: FastAPI, get_model: Callable[[], ServedModel], inbox: Inbox, book: FeedbackBook | None) -> None:
    """Add the route. Without a book the server keeps no log, and feedback would never meet its answer."""

    @app.post(
        "/feedback",
        response_model=FeedbackAnswer | FeedbackListAnswer,
        responses={**REFUSED, **FEEDBACK_ERRORS},
        openapi_extra={"requestBody": FEEDBACK_BODY},
        summary="Say what an answered image shows",
    )
    async def feedback(request: Request) -> Response:
        """Send the `request_id` of an answer, and the `label` (or, for multilabel, the `labels`) that is right.

        The same again gives the same answer. Another label for the same id is a correction: the newest counts. A list
        of such objects in `feedback` gets a list `results`, in which one that is wrong spoils no other.
        """
        if book is None:
            found = "this server writes no log"
            raise RequestError(found, todo="Set `serve.log: true`.", status=404, reason_code="no_log")
        card = get_model().predictor.card
        client = request.state.who
        items, is_list = _list_items(await inbox.receive_json(request, FORM, MAX_BODY_BYTES))
        book.charge(client or (request.client.host if request.client else ""), len(items))
        now, results, rows = datetime.now(UTC), [], []
        for item in items:
            try:
                row = book.check(item, card, now)
            except RequestError as exc:
                book.num_refused += 1
                if not is_list:
                    raise
                given = item.get("request_id") if isinstance(item, dict) else None
                known = given if isinstance(given, str) else None
                results.append({"request_id": known, "error": {"code": exc.reason_code, "message": str(exc)}})
                continue
            rows.append({**row, "client": client})
            results.append({"request_id": row["request_id"], "labels": row["labels"], "status": "taken"})
        if rows:
            await book.write_in_time(rows, now)
        return JSONResponse({"results": results} if is_list else results[0])


def _list_items(value: object) -> tuple[list[object], bool]:
    """Return the items of a body, and whether it is a list of them."""
    if not isinstance(value, dict) or "feedback" not in value:
        return [value], False
    items = value["feedback"]
    if set(value) != {"feedback"} or not isinstance(items, list) or not items:
        raise _bad("its `feedback` is no list of items, or something is beside it", '{"feedback": [' + FORM + ", ...]}")
    if len(items) > MAX_ITEMS:
        found = f"it has {len(items)} items"
        raise RequestError(
            found, f"at most {MAX_ITEMS}", "Send several requests.", status=413, reason_code="too_many_items"
        )
    return items, True


def _read_labels(item: Mapping[str, Any], card: Card) -> list[str]:
    """Return the labels of an item, each once. Raises RequestError."""
    if ("label" in item) == ("labels" in item):
        raise _bad("an item has both or neither of `label` and `labels`", "one of them")
    labels = [item["label"]] if "label" in item else item["labels"]
    if not isinstance(labels, list) or len(labels) > MAX_LABELS or not all(_is_text(label) for label in labels):
        raise _bad(
            "a label is no text that can be printed", f"up to {MAX_CHARS} characters without {LABEL_SEPARATOR!r}"
        )
    if any(LABEL_SEPARATOR in label for label in labels):
        raise _bad(f"a label has {LABEL_SEPARATOR!r} in it", "several labels in `labels`")
    labels = list(dict.fromkeys(labels))
    if card.task != "multilabel" and len(labels) != 1:
        raise _bad(f"an item has {len(labels)} labels", f"one: the model is {card.task}")
    return labels


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_CHARS and value.isprintable() and bool(value.strip())


def _bad(found: str, expected: str = FORM) -> RequestError:
    return RequestError(found, expected, reason_code="bad_feedback")
