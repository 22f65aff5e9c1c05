"""What every request gets, whatever its route: an id, a count, a line in the log, HEAD, and one shape for all errors.

Plain ASGI, so it never buffers a body.
"""

import difflib
import json
import logging
import re
import time
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visionloop.data.prediction_log import make_request_id
from visionloop.errors import ImageError, VisionLoopError
from visionloop.serving.access import HEALTH, METRICS, Access, hide_keys, is_preflight
from visionloop.serving.body import RequestError
from visionloop.serving.metrics import Meters
from visionloop.serving.schemas import PROBLEM, is_of_protocol

IMAGE_STATUS = {"empty": 400, "not_an_image": 415, "too_large": 422, "damaged": 422}
RETRY_AFTER_S = "1"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
TRACE_ID = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # of the header `traceparent`
ERROR_KINDS = (VisionLoopError, HTTPException, ClientDisconnect, RequestValidationError)
MAX_PATH_CHARS, MAX_CLIENT_CHARS, MAX_OPTION_CHARS = 200, 64, 40
# Of answers that are no page. A page sets its own policy.
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}

log = logging.getLogger(__name__)
request_log = logging.getLogger("visionloop.requests")


async def answer_error(request: Request, exc: Exception) -> Response:
    status, code, message = _translate(exc)
    request.state.outcome = code
    headers = {str(k): str(v) for k, v in (getattr(exc, "headers", None) or {}).items()}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.setdefault("Retry-After", RETRY_AFTER_S)
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
        headers["Connection"] = "close"  # the rest of the body is still on its way
    if is_of_protocol(request.scope["path"]):
        return JSONResponse({"error": message}, status, headers)
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": message,
        "code": code,
        "error": {"code": code, "message": message},  # as it was before, for one release
        **name_request(request),
    }
    return JSONResponse(body, status, headers, media_type=PROBLEM)


async def check_options(request: Request) -> None:
    """Refuse what asks for something by an option that there is not, or by one twice. Only POST: probes may add any.

    A coroutine: FastAPI sends a plain function to a thread, with every request.

    Raises:
        RequestError: the address has such an option.
    """
    if request.method != "POST":
        return
    known = [each.alias for each in request.scope["route"].dependant.query_params]
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name[:MAX_OPTION_CHARS], known, n=1) or known
            expected = f"one of {', '.join(near)}" if len(near) > 1 else (near or ["none"])[0]
            found = f"query {name[:MAX_OPTION_CHARS]!r} is no option"
            raise RequestError(found, expected, status=422, reason_code="bad_option")
        if given.count(name) > 1:
            raise RequestError(f"query {name} is there twice", "it once", status=422, reason_code="bad_option")


def name_request(request: Request) -> dict[str, str | None]:
    """Return the server's own id of a request, which no other has, and beside it the one that the client sent."""
    return {"request_id": request.state.request_id, "client_request_id": request.state.client_request_id}


def _translate(exc: Exception) -> tuple[int, str, str]:
    """Return the HTTP status, the stable code and the message of an error."""
    if isinstance(exc, RequestError):
        return exc.status, exc.reason_code, str(exc)
    if isinstance(exc, ImageError):
        return IMAGE_STATUS.get(exc.reason_code, 422), exc.reason_code, str(exc)
    if isinstance(exc, ClientDisconnect):
        return 400, "disconnected", "request: the client went away."
    if isinstance(exc, RequestValidationError):
        first = exc.errors()[0]
        where, name = first["loc"][0], first["loc"][-1]
        return 422, "bad_option", f"request: {where} {name}: {first['msg']}."
    if isinstance(exc, HTTPException):
        code = HTTPStatus(exc.status_code).phrase.lower().replace(" ", "_")
        return exc.status_code, code, f"request: {exc.detail}."
    log.error("unexpected error", exc_info=exc)
    return 500, "internal", "server: an unexpected error; see its log under the request id."


class Envelope:
    """Wraps every request: sets its id, lets it in, counts it, and turns any other exception into a 500.

    HEAD is answered as GET without its body. A slash at the end of a path means nothing: a redirect would name the
    scheme that this process sees, which behind a proxy with TLS is the wrong one.
    """

    def __init__(self, app: ASGIApp, meters: Meters, counted: str, access: Access) -> None:
        """`counted` is a pattern of the paths whose POST requests are counted."""
        self._app, self._meters, self._counted, self._access = app, meters, re.compile(counted), access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"
        scope = {**scope, "path": scope["path"].rstrip("/") or "/", "method": "GET" if is_head else scope["method"]}
        request = Request(scope, receive)
        self._begin(request)
        headers = {**SAFE_HEADERS, **self._access.make_cors_headers(request)}
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["X-Request-ID"] = request.state.client_request_id or request.state.request_id
                for name, value in headers.items():
                    sent.setdefault(name, value)
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._answer(request, scope, receive, send_with_headers)
        except Exception as exc:
            sent_id = request.state.client_request_id
            mine = f" (the client's id: {sent_id})" if sent_id else ""
            log.error("request %s failed%s", request.state.request_id, mine)
            if status:
                raise
            await (await answer_error(request, exc))(scope, receive, send_with_headers)
        finally:
            self._end(request, status)

    def _begin(self, request: Request) -> None:
        sent_id = request.headers.get("x-request-id", "")
        state = request.state
        state.client_request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else None
        state.request_id, state.outcome, state.started = make_request_id(time.time()), "ok", time.perf_counter()
        state.access, state.key, state.who, state.model = self._access, None, None, None

    async def _answer(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        if is_preflight(request) and "Access-Control-Allow-Methods" in self._access.make_cors_headers(request):
            await Response(status_code=204)(scope, receive, send)
            return
        try:
            self._access.check(request)
        except VisionLoopError as exc:  # a body that still comes is read on by uvicorn, and thrown away
            await (await answer_error(request, exc))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _end(self, request: Request, status: int) -> None:
        seconds, path, state = time.perf_counter() - request.state.started, request.scope["path"], request.state
        if self._counted.fullmatch(path) and request.method == "POST":
            self._meters.count_request(state.outcome, seconds, status)
        if not request_log.isEnabledFor(logging.INFO):
            return
        if status < 400 and (path.startswith(HEALTH) or path == METRICS):
            return  # what balancers and Prometheus ask all day
        trace = TRACE_ID.fullmatch(request.headers.get("traceparent", ""))
        request_log.info(
            "request",
            extra={
                "request_fields": {
                    "request_id": state.request_id,
                    "client_request_id": state.client_request_id,
                    "trace_id": trace[1] if trace else None,
                    "method": request.method[:16],
                    "path": path[:MAX_PATH_CHARS],
                    "status": status,
                    "outcome": state.outcome,
                    "duration_ms": round(1000 * seconds, 3),
                    "model": state.model,
                    "who": state.who,
                    "client": request.client.host[:MAX_CLIENT_CHARS] if request.client else None,
                }
            },
        )


class JsonLines(logging.Formatter):
    """A line of JSON for each record: time, level, message, and what is known of a request.

    All ASCII, so that nothing that a client sends can begin a line of its own, and without keys.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "request_fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return hide_keys(json.dumps(line))
