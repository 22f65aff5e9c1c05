"""Who may reach the server: by host, origin, port, key and rate. Knows no routes' answers, and reads no body.

A browser sends what any page on the web asks it to. So a page of another origin may not change anything here, unless
`serve.cors` names it; and a server that only this machine reaches answers to this machine's names alone (a name of
somebody else that leads to 127.0.0.1 would make his page one of the same origin).
"""

import ipaddress
import math
import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from fastapi import Request

from visionloop.errors import shorten
from visionloop.serving.body import RequestError
from visionloop.serving.keys import Key, Keys

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
FREE_PATHS = (  # the same for all, or for balancers
    *("/", "/docs", "/openapi.json"),
    *("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"),
)
METRICS, ADMIN, HEALTH, PAGE = "/metrics", "/admin/", ("/health/", "/v2/health/"), "/page/"
ROLE_OF = {"/feedback": "feedback", ADMIN: "admin", METRICS: "admin"}  # all others: predict, also those yet to come
HEADERS = "Authorization: Bearer KEY, or X-API-Key: KEY"
KEY_IN_TEXT = re.compile(r"vlk_([a-z0-9-]{1,63})_[A-Za-z0-9_-]+")
MAX_BUCKETS = 10_000
CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-API-Key, X-Deadline-Ms, X-Request-ID",
    "Access-Control-Max-Age": "600",
}


class RateExceeded(RequestError):
    """A client asks for more than its share. The same request is answered after `Retry-After`."""

    transient = True


class Rates:
    """A token bucket for each client: so many things in each period, and those of one period at once.

    Example, at 2 images a second: the bucket holds 2. A request takes 1, a second one takes 1, a third one is told to
    wait until there is 1 again: 0.5 s, so 1 s. A request with 5 images takes the other 4 when they are counted: the
    bucket is at -3, and there is 1 again in 2 s.
    """

    def __init__(self, what: str = "images a second", period_s: float = 1.0) -> None:
        self._what, self._period_s = what, period_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: level, at that time

    def take(self, client: str, rate: float, now_s: float, number: int = 1) -> None:
        """Count things, of which there may be more than are left: then the next one waits. Raises RateExceeded."""
        full, per_s = max(1.0, rate), rate / self._period_s
        level, at_s = self._buckets.get(client, (full, now_s))
        level = min(full, level + (now_s - at_s) * per_s)
        if level < 1:
            after_s, expected = max(1, math.ceil((1 - level) / per_s)), f"at most {rate:g} {self._what}"
            todo, headers = f"Try again in {after_s} s.", {"Retry-After": str(after_s)}
            raise RateExceeded(
                "it is above your rate", expected, todo, status=429, reason_code="too_many", headers=headers
            )
        self._buckets[client] = (level - number, now_s)
        self._buckets.move_to_end(client)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)

    def charge(self, client: str, number: int) -> None:
        """Count more images of a request that was taken."""
        if number and client in self._buckets:
            level, at_s = self._buckets[client]
            self._buckets[client] = (level - number, at_s)


@dataclass(frozen=True)
class Access:
    """The rules of one server. `hosts` are names without a port, or `*.domain`, or `*` for all; `cors` are origins.

    Figures and /admin also answer to this machine's names, and to the address that a request came to: Prometheus finds
    its targets by that, and no name of somebody else's is one.

    `is_public`: other machines reach it. With `admin_port` figures and /admin are there and nowhere else.
    """

    keys: Keys | None = None
    hosts: tuple[str, ...] = ("*",)
    cors: tuple[str, ...] = ()
    rate_per_s: float | None = None
    admin_port: int | None = None
    is_public: bool = False
    rates: Rates = field(default_factory=Rates)

    @property
    def is_open(self) -> bool:
        """Whether no key was ever made."""
        return self.keys is None or self.keys.is_open

    @property
    def has_problem(self) -> bool:
        """Whether the file of keys is damaged or gone, and those known before are used."""
        return self.keys is not None and self.keys.problem is not None

    def check(self, request: Request) -> None:
        """Let a request in, or raise; set `key` and `who` of its state.

        Raises:
            RequestError: the wrong host, origin or port; no key with the role for it; above its rate.
        """
        path = request.scope["path"]
        self._check_port(request, path)
        if not path.startswith(HEALTH):
            self._check_host(request)
        if request.method not in SAFE_METHODS:
            self._check_origin(request)
        if path in FREE_PATHS or path.startswith(PAGE):
            return
        request.state.key = key = self._find_key(request)
        request.state.who = key.name if key else None
        if path != METRICS or (self.admin_port is None and not self.is_open):
            require_role(request, next((role for start, role in ROLE_OF.items() if path.startswith(start)), "predict"))
        rate_per_s = self.rate_per_s if key is None or key.rate_per_s is None else key.rate_per_s
        if rate_per_s is not None and not path.startswith((METRICS, ADMIN)):
            request.state.client = f"key {key.name}" if key else f"host {request.client.host if request.client else ''}"
            self.rates.take(request.state.client, rate_per_s, time.monotonic())

    def charge(self, request: Request, images: int) -> None:
        """Count the images of a request; one was counted when it came."""
        if client := getattr(request.state, "client", None):
            self.rates.charge(client, images - 1)

    def make_cors_headers(self, request: Request) -> dict[str, str]:
        """Return the headers that let a page of an allowed origin read the answer."""
        if not self.cors:
            return {}
        headers = {"Vary": "Origin"}
        origin = request.headers.get("origin")
        if origin is not None and self._trusts(origin):
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After, X-Request-ID"
            if is_preflight(request):
                headers |= CORS_HEADERS
        return headers

    def _check_port(self, request: Request, path: str) -> None:
        if self.admin_port is None or path.startswith(HEALTH):
            return
        server = request.scope.get("server")
        is_admin = server is not None and server[1] == self.admin_port
        if is_admin != path.startswith((METRICS, ADMIN)):
            raise RequestError("there is nothing at this address", status=404, reason_code="not_found")

    def _check_host(self, request: Request) -> None:
        given = request.headers.getlist("host")
        if len(given) > 1:
            raise RequestError("it has several Host headers", "one", reason_code="bad_host")
        if "*" in self.hosts:
            return
        name = _parse_host(given[0]) if given else ""
        is_for_operators = request.scope["path"].startswith((METRICS, ADMIN))
        if is_for_operators and (name in LOOPBACK_HOSTS or _is_own_address(name, request)):
            return
        if not any(name == host or (host.startswith("*.") and name.endswith(host[1:])) for host in self.hosts):
            expected, todo = shorten(self.hosts), "Name the host in `serve.hosts` of params.yaml."
            raise RequestError(f"it is for the host {name[:80]!r}", expected, todo, reason_code="bad_host")

    def _check_origin(self, request: Request) -> None:
        """Refuse what a page of another origin sends, by what its browser says: as Go's http.CrossOriginProtection."""
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        if site in ("same-origin", "none") or (origin is not None and self._trusts(origin)):
            return
        if site is None and (origin is None or _parse_origin(origin) == request.headers.get("host", "").lower()):
            return
        todo = "Name the page's origin in `serve.cors` of params.yaml."
        found = f"it comes from a page of {(origin or 'another origin')[:120]!r}"
        raise RequestError(found, "a page of this server", todo, status=403, reason_code="bad_origin")

    def _trusts(self, origin: str) -> bool:
        return origin in self.cors or ("*" in self.cors and origin != "null")

    def _find_key(self, request: Request) -> Key | None:
        """Return the request's key; None if it has none. Raises RequestError for one that is not valid."""
        if self.keys is None or self.keys.is_open:
            return None
        bearer = [value.partition(" ") for value in request.headers.getlist("authorization")]
        texts = [text.strip() for kind, _, text in bearer if kind.lower() == "bearer"]
        texts += request.headers.getlist("x-api-key")
        if KEY_IN_TEXT.search(unquote(request.url.query)):
            todo = "Revoke that key: addresses are written into logs."
            raise _refuse_key("its address has a key", f"it in a header: {HEADERS}", todo)
        if not texts and not bearer:
            return None
        key = self.keys.find(texts[0]) if len(set(texts)) == 1 else None
        if key is None:
            found = "it has several keys" if len(set(texts)) > 1 else "its key is not valid"
            raise _refuse_key(found, "one that is", f"Send it as {HEADERS}.")
        return key


def require_role(request: Request, role: str) -> None:
    """Let a request go on if its key has a role. `request.state.who` is the key's name, None on an open server.

    `Access` asks for the role of each path, before a route is called. On a server without keys all may do all where
    only this machine reaches it; others may only predict.

    Raises:
        RequestError: there is no key (401), or not one with this role (403).
    """
    access, key = request.state.access, request.state.key
    if access.is_open:
        if role == "predict" or not access.is_public:
            return
        todo = f"Make one with `visionloop keys new --role {role} --name NAME`."
        raise _refuse_key("this server has no keys", f"a key with the role {role} for this", todo, status=403)
    if key is None:
        raise _refuse_key("it has no key", f"a key with the role {role}", f"Send it as {HEADERS}.")
    if not key.allows(role):
        found, expected = f"the key {key.name} has the role {', '.join(key.roles)}", f"a key with the role {role}"
        raise _refuse_key(found, expected, "Ask for such a key.", status=403)


def _refuse_key(found: str, expected: str, todo: str, *, status: int = 401) -> RequestError:
    """Return the error of a request without a valid key (401), or whose key has not the role that it takes (403)."""
    code, headers = ("no_valid_key", {"WWW-Authenticate": 'Bearer realm="visionloop"'}) if status == 401 else ("", {})
    return RequestError(found, expected, todo, status=status, reason_code=code or "not_allowed", headers=headers)


def is_preflight(request: Request) -> bool:
    """Whether a browser asks what a page of another origin may do here."""
    return request.method == "OPTIONS" and "access-control-request-method" in request.headers


def hide_keys(text: str) -> str:
    """Return text without the keys in it; their names stay."""
    return KEY_IN_TEXT.sub(r"vlk_\1_***", text)


def _parse_host(text: str) -> str:
    """Return the name of a Host header, without its port and the brackets of IPv6."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\s]+))(?::[0-9]{1,5})?", text)
    return (match[1] or match[2]).lower().rstrip(".") if match else text


def _is_own_address(name: str, request: Request) -> bool:
    """Say whether a host is the address of this machine that a request came to: an address, never a name."""
    server = request.scope.get("server")
    try:
        return server is not None and ipaddress.ip_address(name) == ipaddress.ip_address(server[0].partition("%")[0])
    except ValueError:
        return False


def _parse_origin(origin: str) -> str | None:
    """Return what the Host header would be of a request within an origin."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
