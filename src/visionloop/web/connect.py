"""Sockets for `download.py`: a name is resolved, its address is checked, and exactly this address is connected to.

So a name that resolves to another address the second time (DNS rebinding) gains nothing. TLS still checks the name.
Every wait on a socket ends at the deadline of the request, however slowly bytes come. This module needs httpcore.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore

from visionloop.errors import ImageError
from visionloop.web.addresses import HostRules, IPAddress

MAX_CONNECTIONS = 64


class Deadline(threading.local):
    """When the request of this thread must end, in seconds of the monotonic clock."""

    at = float("inf")

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Let the request of this thread take so long."""
        self.at = time.monotonic() + seconds
        try:
            yield
        finally:
            self.at = float("inf")

    def extend(self, seconds: float) -> None:
        self.at += seconds

    def cut(self, timeout_s: float | None) -> float:
        """Return the time that a socket may still wait. Raises httpcore.ReadTimeout when there is none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the whole answer took too long")
        return left if timeout_s is None else min(left, timeout_s)


def make_pool(rules: HostRules, deadline: Deadline) -> httpcore.ConnectionPool:
    """Return a pool of connections, safe for threads. It reads no proxy and no password from the environment."""
    return httpcore.ConnectionPool(
        ssl_context=httpcore.default_ssl_context(),
        max_connections=MAX_CONNECTIONS,
        max_keepalive_connections=MAX_CONNECTIONS // 2,
        keepalive_expiry=15.0,
        network_backend=CheckedBackend(rules, deadline),
    )


class CheckedBackend(httpcore.NetworkBackend):
    """Connects only to addresses that the rules allow."""

    def __init__(self, rules: HostRules, deadline: Deadline) -> None:
        self._rules, self._deadline, self._plain = rules, deadline, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for ip in resolve(self._rules, host, port):
            try:
                stream = self._plain.connect_tcp(
                    str(ip), port, self._deadline.cut(timeout), local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
                continue
            peer = ipaddress.ip_address(stream.get_extra_info("server_addr")[0])
            if peer != ip:
                stream.close()
                raise _refuse(host, port, f"{host} was connected at another address than the one that was checked")
            return BoundedStream(stream, self._deadline)
        raise failure


class BoundedStream(httpcore.NetworkStream):
    """A connection whose every wait ends at the deadline of the request."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.cut(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.cut(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        # Python's handshake takes its timeout as the limit of the whole handshake, not of each read in it.
        secured = self._stream.start_tls(ssl_context, server_hostname, self._deadline.cut(timeout))
        return BoundedStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def resolve(rules: HostRules, host: str, port: int) -> list[IPAddress]:
    """Return the addresses of a host that may be connected to.

    Raises:
        ImageError: `refused_url`: it has addresses, and none of them is allowed.
        httpcore.ConnectError: the name is unknown.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise httpcore.ConnectError("the host's name is unknown") from exc
    # A scope like fe80::1%eth0 is cut off: link-local addresses are refused with it or without.
    ips = list(dict.fromkeys(ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found))
    refusals = {ip: rules.explain_refusal(host, port, ip) for ip in ips}
    allowed = [ip for ip in ips if refusals[ip] is None]
    if not allowed:
        raise _refuse(host, port, next((text for text in refusals.values() if text), f"{host} has no address"))
    return allowed


def _refuse(host: str, port: int, found: str) -> ImageError:
    return ImageError(
        f"URL {host}:{port}",
        found,
        "a public address",
        "If this host is yours, name it in VISIONLOOP_PRIVATE_HOSTS.",
        reason_code="refused_url",
    )
