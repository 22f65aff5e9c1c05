"""What every request gets, whatever its route: an id, a count, HEAD, and one shape for all errors.

Plain ASGI, so it never buffers a body.
"""

import logging
import re
import time
from http import HTTPStatus

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from visionloop.data.prediction_log import make_request_id
from visionloop.errors import ImageError, VisionLoopError
from visionloop.serving.batcher import QueueFull
from visionloop.serving.body import RequestError
from visionloop.serving.metrics import Meters
from visionloop.serving.schemas import PROBLEM

IMAGE_STATUS = {"empty": 400, "not_an_image": 415, "too_large": 422, "damaged": 422}
RETRY_AFTER_S = "1"
REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,64}$")
ERROR_KINDS = (VisionLoopError, HTTPException, ClientDisconnect, RequestValidationError)

log = logging.getLogger(__name__)


async def answer_error(request: Request, exc: Exception) -> Response:
    status, code, message = _translate(exc)
    request.state.outcome = code
    headers = {str(k): str(v) for k, v in (getattr(exc, "headers", None) or {}).items()}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.setdefault("Retry-After", RETRY_AFTER_S)
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
        headers["Connection"] = "close"  # the rest of the body is still on its way
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


def name_request(request: Request) -> dict[str, str | None]:
    """Return the server's own id of a request, which no other has, and beside it the one that the client sent."""
    return {"request_id": request.state.request_id, "client_request_id": request.state.client_request_id}


def _translate(exc: Exception) -> tuple[int, str, str]:
    """Return the HTTP status, the stable code and the message of an error."""
    if isinstance(exc, RequestError | QueueFull):
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
    """Wraps every request: sets its id, counts it, and turns any other exception into a 500.

    HEAD is answered as GET without its body. A slash at the end of a path means nothing: a redirect would name the
    scheme that this process sees, which behind a proxy with TLS is the wrong one.
    """

    def __init__(self, app: ASGIApp, meters: Meters, counted: str) -> None:
        """`counted` is the path whose POST requests are counted."""
        self._app, self._meters, self._counted = app, meters, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get("x-request-id", "")
        client_id = sent_id if REQUEST_ID.match(sent_id) else None
        request_id = make_request_id(time.time())
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, client_request_id=client_id, outcome="ok", started=time.perf_counter())
        is_head = scope["method"] == "HEAD"
        scope = {**scope, "path": scope["path"].rstrip("/") or "/", "method": "GET" if is_head else scope["method"]}
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["X-Request-ID"] = client_id or request_id
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as exc:
            log.error("request %s failed%s", request_id, f" (the client's id: {client_id})" if client_id else "")
            if begun:
                raise
            await (await answer_error(Request(scope), exc))(scope, receive, send_with_id)
        finally:
            if scope["path"] == self._counted and scope["method"] == "POST":
                self._meters.count_request(state["outcome"], time.perf_counter() - state["started"])
