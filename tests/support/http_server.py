"""A small web server on loopback for tests: each path has an answer, or a function that writes what it likes."""

import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """What a path gives. `cut`: so many bytes of the body are sent, then the connection breaks."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass(frozen=True)
class Request:
    """A request that came, headers in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""


Route = Answer | Callable[["Handler"], Answer | None]


@dataclass
class WebServer:
    """A running server: its address, its answers by path (the query counts when it is in the key), what was asked."""

    port: int
    routes: dict[str, Route] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    @property
    def targets(self) -> list[str]:
        return [request.target for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    """Answers as the routes say; a function in the routes may write to `wfile` itself and return None."""

    protocol_version = "HTTP/1.1"
    timeout = 10
    disable_nagle_algorithm = True
    site: WebServer

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        self.site.requests.append(Request(self.command, self.path, headers, body))
        route = self.site.routes.get(self.path) or self.site.routes.get(self.path.partition("?")[0])
        answer = Answer(b"nothing here", 404) if route is None else route if isinstance(route, Answer) else route(self)
        if answer is None:
            self.close_connection = True
            return
        body = answer.body
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if answer.cut is None else body[: answer.cut])
        self.close_connection = self.close_connection or answer.cut is not None

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that hang up are what these tests are about."""


@contextmanager
def serve(routes: Mapping[str, Route] | None = None, tls: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    """Run a server on a free port of 127.0.0.1 until the block ends."""
    server = _Server(("127.0.0.1", 0), Handler)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    site = WebServer(server.server_address[1], dict(routes or {}))
    server.RequestHandlerClass = type("BoundHandler", (Handler,), {"site": site})
    with running(server):
        yield site


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[None]:
    """Let a server work in a thread of its own until the block ends, then close it."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
