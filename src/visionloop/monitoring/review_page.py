"""The page that asks for labels: a small server on this machine alone, for as long as the command runs.

Its address holds a secret, so that no other user of the machine and no page of elsewhere can ask or answer: whoever
posts must know it, name this machine as the host, and be this page. An answer is acknowledged when the store has it.
Pictures are decoded and encoded anew: what a client once sent reaches no browser as it is.
"""

import hmac
import json
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from visionloop.data.answers import LABEL, UNDO, VERDICTS, Asked, Batch, Labels, load_opinions, write_answers
from visionloop.errors import ImageError, ObjectMissing, SettingsError, VisionLoopError
from visionloop.monitoring.answer_sheet import check_labels, load_picture
from visionloop.workspace import Workspace

LOOPBACK = "127.0.0.1"
HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_BODY_BYTES, MAX_ANSWERS = 1_000_000, 10_000
BIG_PX, SMALL_PX = 1600, 240
KEPT_PICTURES = 200
SOCKET_S = 30


class Refused(Exception):
    """A request that is not answered: the status, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class ReviewPage:
    """One batch, asked of one person. `after`: what the page says once all is answered."""

    def __init__(self, workspace: Workspace, batch: Batch, *, by: str, port: int = 0, after: str = "") -> None:
        """Raises SettingsError: the port is taken."""
        self.workspace, self.batch, self.by, self.after = workspace, batch, by, after
        self.num_stored = 0
        self._images = {one.sha256: one for one in batch.images}
        similar = {str(like["sha256"]) for one in batch.images for like in one.similar} - self._images.keys()
        self._similar = {sha256: Asked(sha256, "", "", (), 0.0, "") for sha256 in similar}
        self._token, self._decoding = secrets.token_urlsafe(24), threading.Semaphore(2)
        self._load = lru_cache(KEPT_PICTURES)(self._load_picture)
        page, handler = self, type("Handler", (_Handler,), {"page": self})
        try:
            self._server = _Server((LOOPBACK, port), handler)
        except OSError as exc:
            todo = "Leave --port out: a free one is chosen."
            raise SettingsError("--port", f"{port} cannot be used ({exc.strerror})", "a free port", todo) from exc
        self.url = f"http://{LOOPBACK}:{self._server.server_address[1]}/{page._token}/"

    def serve(self) -> None:
        """Answer until `stop` is called, or the process ends."""
        self._server.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        """End, from another thread."""
        self._server.shutdown()
        self._server.server_close()

    def knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token.encode())

    def describe(self) -> dict[str, Any]:
        """Return what the page shows, with the answers that there are."""
        own, others = dict[str, dict[str, Any]](), dict[str, int]()
        for one in load_opinions(self.workspace.store, self.workspace.name, [self.batch]):
            if one.verdict == UNDO:
                continue
            if one.who == self.by:
                own[one.asked.sha256] = {"verdict": one.verdict, "labels": list(one.labels)}
            else:
                others[one.asked.sha256] = others.get(one.asked.sha256, 0) + 1
        images = [
            {
                "sha256": one.sha256,
                "model": list(one.model),
                "confidence": one.confidence,
                "reason": one.reason,
                "proposed": list(one.proposed),
                "similar": [{"sha256": like["sha256"], "labels": like["labels"]} for like in one.similar],
                "answer": own.get(one.sha256),
                "others": others.get(one.sha256, 0),
            }
            for one in self.batch.images
        ]
        batch = self.batch
        return {
            "name": self.workspace.name,
            "number": batch.number,
            "kind": batch.kind,
            "task": batch.task,
            "classes": list(batch.classes),
            "by": self.by,
            "after": self.after,
            "images": images,
        }

    def take(self, body: object) -> int:
        """Store answers; return how many. Raises Refused."""
        items = body.get("answers") if isinstance(body, dict) else None
        if not isinstance(items, list) or not 0 < len(items) <= MAX_ANSWERS:
            raise Refused(400, 'expected {"answers": [{"sha256", "verdict", "labels"}, ...]}')
        answers = dict(self._check(one) for one in items)
        try:
            write_answers(self.workspace.store, self.workspace.name, self.batch, answers, by=self.by, via="page")
        except ObjectMissing as exc:
            raise Refused(410, "the image is gone from the store; skip it") from exc
        except VisionLoopError as exc:
            raise Refused(503, f"the store does not take it ({exc.found}); answer again") from exc
        self.num_stored += len(answers)
        return len(answers)

    def _check(self, item: object) -> tuple[str, tuple[str, Labels]]:
        """Return an answer as it is stored. Raises Refused."""
        known = isinstance(item, dict) and isinstance(item.get("sha256"), str) and item["sha256"] in self._images
        if not isinstance(item, dict) or not known or item.get("verdict") not in VERDICTS:
            raise Refused(400, f"an answer is of an image of this batch, and one of {', '.join(VERDICTS)}")
        sha256, verdict, labels = item["sha256"], item["verdict"], item.get("labels", [])
        if verdict != LABEL:
            return sha256, (verdict, ())
        if not isinstance(labels, list) or not all(isinstance(one, str) for one in labels):
            raise Refused(400, "labels are a list of texts")
        kept, found, expected = check_labels(labels, self.batch, allow_new=item.get("new") is True)
        if found:
            raise Refused(422, f"it {found}; expected {expected}")
        return sha256, (verdict, kept)

    def load(self, sha256: str, *, small: bool) -> bytes:
        """Return a picture of an image that is shown. Raises Refused."""
        asked = self._images.get(sha256) or self._similar.get(sha256)
        if asked is None:
            raise Refused(404, "no image of this batch")
        try:
            return self._load(asked.sha256, SMALL_PX if small else BIG_PX)
        except (ObjectMissing, ImageError) as exc:
            raise Refused(410, "the image is gone, or cannot be shown") from exc
        except VisionLoopError as exc:
            raise Refused(503, "the store does not answer") from exc

    def _load_picture(self, sha256: str, max_px: int) -> bytes:
        asked = self._images.get(sha256) or self._similar[sha256]
        limit, name = self.workspace.params.ingest.max_pixels, self.workspace.name
        with self._decoding:
            return load_picture(self.workspace.store, name, asked, max_px, max_pixels=limit)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that has gone away."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Routes, below the secret of the address: the page, `state`, `image/SHA256`, and by POST `answer`."""

    page: ReviewPage
    timeout = SOCKET_S
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "visionloop", ""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the address is a secret."""

    def _answer(self, make: Callable[[str, str], tuple[str, bytes, Mapping[str, str]]]) -> None:
        try:
            self._check_host()
            place = urlsplit(self.path)
            token, _, rest = place.path.removeprefix("/").partition("/")
            if not self.page.knows(token):
                raise Refused(404, "nothing is here: use the address that the command has printed")
            kind, data, headers = make(rest, place.query)
            status = 200
        except Refused as exc:
            status, kind, headers = exc.status, "application/json", {}
            data = json.dumps({"error": exc.why}).encode()
            self.close_connection = True  # what is left of a body is not the next request
        except (VisionLoopError, ValueError) as exc:
            status, kind, headers = 503, "application/json", {}
            data = json.dumps({"error": exc.found if isinstance(exc, VisionLoopError) else "bad request"}).encode()
            self.close_connection = True
        self.send_response(status)
        always = {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        }
        for name, value in {**always, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _check_host(self) -> None:
        """Raise Refused unless this machine is named: a name that elsewhere points here would be another origin."""
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            raise Refused(403, "the address names another host than this machine")

    def _get(self, rest: str, query: str) -> tuple[str, bytes, Mapping[str, str]]:
        if rest == "":
            nonce = secrets.token_urlsafe(16)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
                "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            text = files("visionloop.monitoring").joinpath("review.html").read_text(encoding="utf-8")
            data = text.replace("__NONCE__", nonce).encode()
            return "text/html; charset=utf-8", data, {"Content-Security-Policy": policy}
        if rest == "state":
            return "application/json", json.dumps(self.page.describe()).encode(), {}
        if rest.startswith("image/"):
            data = self.page.load(rest.removeprefix("image/"), small=query == "small")
            return "image/jpeg", data, {"Cache-Control": "private, max-age=3600"}
        raise Refused(404, "nothing is here")

    def _post(self, rest: str, query: str) -> tuple[str, bytes, Mapping[str, str]]:
        if rest != "answer":
            raise Refused(404, "nothing is here")
        if self.headers.get("Origin", "") != f"http://{self.headers.get('Host', '')}":
            raise Refused(403, "an answer comes from this page alone")
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "expected application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            raise Refused(413, f"expected a body of at most {MAX_BODY_BYTES:,} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as exc:
            raise Refused(400, "expected JSON") from exc
        return "application/json", json.dumps({"stored": self.page.take(body)}).encode(), {}
