"""`visionloop serve`: connects settings, params, ledger, model and application, and runs them. Nothing else."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Never, cast

import uvicorn
from fastapi import FastAPI

from visionloop.data.known_store import check_store
from visionloop.engines import Open, make_opener, open_plainly
from visionloop.errors import ServingError
from visionloop.lifetime import taking_signals
from visionloop.params import Serve
from visionloop.promotion.ledger import read_champion
from visionloop.promotion.models import load_approved_model
from visionloop.records import LedgerEntry
from visionloop.serving.access import LOOPBACK_HOSTS, Access
from visionloop.serving.app import make_app
from visionloop.serving.body import Limits
from visionloop.serving.connections import Connection, Door
from visionloop.serving.envelope import JsonLines, request_log
from visionloop.serving.feedback import FeedbackBook
from visionloop.serving.keys import Keys
from visionloop.serving.log import SPOOL, PredictionLog
from visionloop.serving.shadow import Shadow
from visionloop.serving.swap import ChampionFollower, ModelSlot, ServedModel
from visionloop.store import open_store
from visionloop.workspace import Workspace

GRACE_S = 10
BACKLOG = 2048
MAX_PORT = 65_535
# A request changes threads some times, and waits so long each time that another one computes: a model that is prepared
# for a swap, rows of the log. By Python's own 5 ms a request of 4 ms takes 20 then.
SWITCH_S = 0.001
SIGNALS = (signal.SIGINT, signal.SIGTERM)

log = logging.getLogger(__name__)


def run_server(
    workspace: Workspace,
    *,
    host: str,
    port: int,
    bundle: str | Path | None = None,
    is_trial: bool = False,
    on_ready: Callable[[str, str], None] = lambda url, engine: None,
) -> None:
    """Serve until SIGINT or SIGTERM, then answer the accepted requests and return.

    Serves the ledger's champion and follows it, or the model at the address `bundle`, and stays with it. Port 0 means
    any free port; `on_ready` is called with the address and the engine that answers. A trial is for one asker on this
    machine: it has no keys, no rate, no second port and no prediction log. Configures logging.

    Raises:
        ServingError: a port cannot be had, or there is no champion. SettingsError: the file of keys is damaged.
        VisionLoopError: the store cannot be read or is not the one known here, or the bundle is refused.
    """
    serve = workspace.params.serve
    _configure_logging(serve)
    with _exit_on_signals(), contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_S)
        socks = [stack.enter_context(_bind(host, port))]
        if serve.admin_port is not None and not is_trial:
            socks.append(
                stack.enter_context(_bind(host, serve.admin_port, "Change `serve.admin_port` in params.yaml."))
            )
        access = Access() if is_trial else make_access(serve, Keys(workspace.settings.keys_path), socks[0])
        slot = ModelSlot()
        follower = None
        open_model = make_opener(workspace, log.warning)
        if bundle is not None:
            opened = load_approved_model(bundle, workspace, open_model)
            slot.current = ServedModel(opened.predictor, why=opened.why, decoders=opened.decoders)
        else:
            follower = _make_follower(workspace, slot, open_model)
            follower.load_first()
            follower.start()
        try:
            look_now = follower.look_now if follower else None
            with _write_log(workspace, is_on=serve.log and not is_trial) as (prediction_log, book):
                shadow = _make_shadow(workspace) if follower and prediction_log else None
                if follower and shadow:
                    follower.after_look = shadow.follow
                    stack.callback(shadow.flush)
                pictures = open_store(workspace.settings.store_url)
                kept: dict[str, Any] = {"log": prediction_log, "book": book, "store": pictures, "shadow": shadow}
                app = make_app(slot, make_limits(serve), access, look_now, **kept)
                url, model = _make_url(host, socks[0]), cast(ServedModel, slot.current)
                _Server(app, serve, slot, lambda: on_ready(url, model.why)).run(socks)
        finally:
            if follower:
                follower.stop()


@contextlib.contextmanager
def _write_log(
    workspace: Workspace, *, is_on: bool
) -> Iterator[tuple[PredictionLog, FeedbackBook] | tuple[None, None]]:
    """Yield what writes answers and feedback into the store; nothing where the log is off."""
    if not is_on:
        yield None, None
        return
    # A store of its own: the connections of the one that follows the ledger are not used at the same time.
    store = open_store(workspace.settings.store_url)
    serve, spool = workspace.params.serve, workspace.settings.hidden_dir / SPOOL
    check = partial(check_store, workspace)
    prediction_log = PredictionLog(workspace.name, store, spool, serve, check=check)
    prediction_log.start()
    try:
        yield prediction_log, FeedbackBook(workspace.name, store, serve, check=check)
    finally:
        prediction_log.stop()


def _make_shadow(workspace: Workspace) -> Shadow:
    threads = workspace.params.serve.threads
    return Shadow(
        workspace.name,
        open_store(workspace.settings.store_url),
        workspace.settings.hidden_dir / "shadow",
        open_model=lambda bundle: open_plainly(bundle, threads=threads).predictor,
        flush_s=workspace.params.serve.log_flush_s,
    )


def make_limits(serve: Serve) -> Limits:
    """Turn the section `serve` of params.yaml into limits that are consistent."""
    return Limits(
        max_body_bytes=serve.max_body_bytes,
        max_pixels=serve.max_pixels,
        max_video_bytes=serve.max_video_bytes,
        max_video_s=serve.max_video_s,
        max_batch=serve.max_batch,
        max_queue=serve.max_queue,
        deadline_s=serve.deadline_s,
        stuck_s=serve.stuck_s,
        cache_bytes=serve.cache_mb * 1_000_000,
        max_files=min(Limits.max_files, serve.max_queue),
        max_held_bytes=max(Limits.max_held_bytes, 2 * serve.max_body_bytes),
    )


def make_access(serve: Serve, keys: Keys, sock: socket.socket) -> Access:
    """Turn the section `serve` of params.yaml into the rules of who may ask the server that listens on `sock`."""
    is_public = not ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
    if is_public and keys.is_open:
        log.warning("all who reach this machine may ask the server: make keys, see `visionloop keys`")
    hosts = serve.hosts or (("*",) if is_public else LOOPBACK_HOSTS)
    return Access(keys, hosts, serve.cors, serve.rate_per_s, serve.admin_port, is_public=is_public)


class _Server(uvicorn.Server):
    """uvicorn's server, with a call when it listens. On a signal it ends with code 0, and does not raise it again.

    SIGTERM is how a balancer's machine is taken away: the server is not ready at once, and still answers for
    `serve.lame_duck_s`, until the balancer has seen it. A second signal, or SIGINT, ends that time.
    """

    def __init__(self, app: FastAPI, serve: Serve, slot: ModelSlot, on_ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http=cast(type[asyncio.Protocol], partial(Connection, Door(serve.max_connections))),
            timeout_keep_alive=serve.keep_alive_s,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(config)
        self._on_ready = on_ready
        self._slot, self._lame_duck_s, self._leave_at = slot, serve.lame_duck_s, math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self._lame_duck_s and not self._slot.is_leaving:
            self._slot.is_leaving = True
            self._leave_at = time.monotonic() + self._lame_duck_s
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or time.monotonic() >= self._leave_at

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with taking_signals(SIGNALS, self.handle_exit):
            yield


def _make_follower(workspace: Workspace, slot: ModelSlot, open_model: Open) -> ChampionFollower:
    store = open_store(workspace.settings.store_url)

    known = 0

    def find_champion() -> LedgerEntry | None:
        nonlocal known
        entry = read_champion(store, workspace.name, since=known)
        known = entry.number if entry else 0
        return entry

    return ChampionFollower(
        slot,
        name=workspace.name,
        find_champion=find_champion,
        store=store,
        cache_dir=workspace.settings.hidden_dir / "serving",
        poll_s=workspace.params.serve.poll_s,
        check=lambda: check_store(workspace),
        open_model=open_model,
    )


def _configure_logging(serve: Serve) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if serve.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())
    request_log.setLevel(logging.INFO if serve.log_format == "json" else logging.WARNING)
    # At lower levels both write a line for every malformed request.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def _bind(host: str, port: int, todo: str = "Pass --port 0 for any free one.") -> socket.socket:
    """Listen on host and port, before a model is loaded: a used port is found at once. Raises ServingError."""
    where = f"port {host}:{port}"
    if not 0 <= port <= MAX_PORT:  # getaddrinfo would take it modulo 65536
        raise ServingError(where, "is no port", f"0 to {MAX_PORT}", todo)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # Without it an answer on a kept-alive connection waits 40 ms for an ACK; asyncio does not set it here.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except socket.gaierror as exc:
        raise ServingError(
            where, "the host is not known", "an address of this machine", "Pass --host 127.0.0.1."
        ) from exc
    except OSError as exc:
        found = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be had ({exc.strerror})"
        raise ServingError(where, found, "a free port", todo) from exc


def _make_url(host: str, sock: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


def _exit_on_signals() -> contextlib.AbstractContextManager[None]:
    """Before serving starts, let a signal end the process at once, with code 0."""

    def leave(_number: int, _frame: FrameType | None) -> Never:
        raise SystemExit(0)

    return taking_signals(SIGNALS, leave)
