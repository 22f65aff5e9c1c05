"""What a URL may be, which hosts it may name, and which addresses may be connected to. Pure: nothing is resolved here.

There is one strict parser, and exactly what it returns is requested: so two programs cannot read the same URL in two
ways. `connect.py` asks `explain_refusal` about the address that a socket really connects to.
"""

import hashlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import parse_qsl, quote

from visionloop.errors import ImageError, SourceError
from visionloop.secrets import mask

MAX_URL_CHARS = 8192
MAX_HOST_CHARS = 253
DEFAULT_PORTS = {"http": 80, "https": 443}
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_URL = re.compile(r"(?i)(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?")
_TARGET = re.compile(r"/[A-Za-z0-9/%:@!$&'()*+,;=~\-._]*(?:\?[A-Za-z0-9/%:@!$&'()*+,;=~\-._?]*)?")  # needs no quoting
_BAD = re.compile(r"[\x00-\x1f\x7f-\xa0\\\u2028\u2029]")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
# If the last part of a host looks like this, other programs take the host for a number: 127.1, 0x7f000001, 2130706433.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_SECRET_KEY = re.compile(
    r"(?i)token|key|sig|secret|passw|auth|credential|expire|session|^x-(amz|goog|ms)-|^s[a-z]$|policy"
)
# Metadata services of clouds give out credentials: never allowed, not even for a host named as private.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        *("169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"),
    )
)


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# Only hosts named in VISIONLOOP_PRIVATE_HOSTS may have these addresses.
_PRIVATE = {
    "loopback": _networks("127.0.0.0/8", "::1/128"),
    "private": _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"),
    "link-local": _networks("169.254.0.0/16", "fe80::/10"),
    "shared (carrier-grade NAT)": _networks("100.64.0.0/10"),
}


_NEVER = {
    "unspecified": _networks("0.0.0.0/8", "::/128"),
    "multicast": _networks("224.0.0.0/4", "ff00::/8"),
    "broadcast": _networks("255.255.255.255/32"),
    # These IPv6 addresses contain an IPv4 address, perhaps a private one, and gateways connect to that.
    "embedded IPv4": _networks("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"),
    "reserved": _networks(
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("240.0.0.0/4", "2001::/23", "2001:db8::/32", "3fff::/20"),
    ),
}


_GLOBAL_V6 = ipaddress.ip_network("2000::/3")


@dataclass(frozen=True)
class Address:
    """A parsed URL: `host` is lower case, without the brackets of IPv6; `target` is path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def netloc(self) -> str:
        """The host as it stands in a URL, with the port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.target}"

    @property
    def origin(self) -> tuple[str, str, int]:
        """What must be equal for a secret header to be sent."""
        return self.scheme, self.host, self.port

    @property
    def place(self) -> str:
        """Host and path, for origins and messages; of the query only a digest, without what looks like a secret."""
        path, _, query = self.target.partition("?")
        return f"{self.netloc}{path}{_digest_query(query) if query else ''}"


@lru_cache(maxsize=1024)  # a table names thousands of images with one
def _digest_query(query: str) -> str:
    kept = [(k, v) for k, v in parse_qsl(query, keep_blank_values=True) if not _SECRET_KEY.search(k)]
    return f"?{hashlib.sha256(repr(kept).encode()).hexdigest()[:12]}" if kept else ""


@dataclass(frozen=True)
class HostRule:
    """One entry of a list of hosts: `example.com`, `*.example.com` (its subdomains), `example.com:8443`."""

    host: str
    port: int | None
    with_subdomains: bool

    def fits(self, host: str) -> bool:
        return host.endswith(f".{self.host}") if self.with_subdomains else host == self.host


@dataclass(frozen=True)
class HostRules:
    """The hosts that may be connected to, and those of them that may lie on a private network."""

    allowed: tuple[HostRule, ...]
    private: tuple[HostRule, ...]

    def check(self, address: Address) -> None:
        """Raise ImageError (`refused_url`) when the host, its port or its literal address may not be connected to."""
        rules = [rule for rule in self.allowed if rule.fits(address.host)]
        if not rules:
            raise _refuse(address.place, f"host {address.host} is not in the list of hosts", "one of `hosts`")
        ports = {rule.port for rule in rules if rule.port} | ({80, 443} if any(not r.port for r in rules) else set())
        if address.port not in ports:
            expected = " or ".join(str(port) for port in sorted(ports))
            raise _refuse(address.place, f"port {address.port} of {address.host} is not in the list of hosts", expected)
        self._check_literal(address)

    def _check_literal(self, address: Address) -> None:
        ip = parse_ip(address.host)
        if ip and (refusal := self.explain_refusal(address.host, address.port, ip)):
            raise _refuse(address.place, refusal, "a public address")

    def explain_refusal(self, host: str, port: int, ip: IPAddress) -> str | None:
        """Return why `host` may not be connected to at this address; None when it may."""
        kind = classify(ip)
        if kind is None:
            return None
        if kind in _PRIVATE:
            if any(rule.fits(host) and rule.port in (None, port) for rule in self.private):
                return None
            return f"{host} is at a {kind} address"
        return f"{host} is at {'an' if kind[0] in 'aeiou' else 'a'} {kind} address"


@dataclass(frozen=True)
class AnyHost(HostRules):
    """Any host over https; over http only this machine, since others could change what comes on its way."""

    def check(self, address: Address) -> None:
        ip = parse_ip(address.host)
        is_here = address.host == "localhost" or (ip is not None and ip.is_loopback)
        if address.scheme != "https" and not is_here:
            raise _refuse(address.place, "is not encrypted", "https://")
        self._check_literal(address)


def classify(ip: IPAddress) -> str | None:
    """Return the kind of a special address (`loopback`, `metadata`, ...); None for one of the public internet."""
    if ip in _METADATA:
        return "metadata"
    for kind, networks in (*_NEVER.items(), *_PRIVATE.items()):
        # ::1 lies in the old range of embedded addresses too.
        if any(ip in network for network in networks) and ip != ipaddress.IPv6Address("::1"):
            return kind
    if ip == ipaddress.IPv6Address("::1"):
        return "loopback"
    return "reserved" if ip.version == 6 and ip not in _GLOBAL_V6 else None


def parse_ip(host: str) -> IPAddress | None:
    """Return the address that a host is, in its plain form only; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def parse_url(url: str) -> Address:
    """Parse a URL, or refuse it: only http and https, no user name, only the plain spelling of a host.

    Spaces and letters beyond ASCII in path and query are percent-encoded; a fragment is dropped.

    Raises:
        ImageError: `refused_url`.
    """
    try:
        return _parse_url(url)
    except ImageError as exc:
        raise _refuse(describe_url(url), exc.found, exc.expected, exc.todo) from None


def _parse_url(url: str) -> Address:
    """Do what `parse_url` does. Its errors do not say where."""
    if len(url) > MAX_URL_CHARS:
        raise _refuse("", f"a URL of {len(url):,} characters", f"at most {MAX_URL_CHARS:,}")
    if bad := _BAD.search(url):
        raise _refuse("", f"a URL with the character {bad.group()!r}", "no control character or backslash")
    match = _URL.fullmatch(url)
    if not match:
        raise _refuse("", "no http or https URL", "http://HOST/PATH or https://HOST/PATH")
    scheme, authority, path, query, _ = match.groups()
    scheme = scheme.lower()
    if "@" in authority:
        raise _refuse("", "a user name or password in the URL", "none", "Send credentials in `headers`.")
    host, port = _split_port(authority)
    target = f"{path or '/'}{query or ''}"
    if not _TARGET.fullmatch(target):
        target = quote(path or "/", safe="/%:@!$&'()*+,;=~-._") + quote(query or "", safe="/%:@!$&'()*+,;=~-._?")
    if not target.startswith("/"):
        raise _refuse("", "a path that does not begin with /", "http://HOST/PATH")
    return Address(scheme, host, port or DEFAULT_PORTS[scheme], target)


def parse_hosts(entries: Iterable[str], where: str) -> tuple[HostRule, ...]:
    """Parse a list of hosts. Raises SourceError, naming the entry."""
    rules = []
    for entry in entries:
        text = entry.strip().lower()
        with_subdomains = text.startswith("*.")
        try:
            host, port = _split_port(text.removeprefix("*."))
        except ImageError as exc:
            raise SourceError(where, f"got {entry!r}", "HOST, HOST:PORT or *.DOMAIN in `hosts`") from exc
        if with_subdomains and (parse_ip(host) or "." not in host):
            raise SourceError(where, f"got {entry!r}", "a domain of two parts or more after `*.` in `hosts`")
        rules.append(HostRule(host, port, with_subdomains))
    return tuple(rules)


def describe_url(url: str) -> str:
    """Return a URL of any shape for a message: no user name, no query, printable, short."""
    shown = mask(re.split(r"[?#]", url, maxsplit=1)[0])
    return "URL " + shown[:120].encode("unicode_escape").decode("ascii") + ("..." if len(shown) > 120 else "")


@lru_cache(maxsize=1024)
def _split_port(authority: str) -> tuple[str, int | None]:
    """Return host and port. Raises ImageError for anything that another parser may read as another host."""
    bracketed = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::(.*))?", authority)
    if authority.startswith("[") and not bracketed:
        raise _refuse("", "a host in brackets that is no address", "[IPv6 address] without a zone")
    host, port_text = bracketed.groups() if bracketed else _cut(authority)
    if port_text is not None and (not _PORT.fullmatch(port_text) or int(port_text) > 65_535):
        raise _refuse("", f"port {port_text!r}", "1 to 65535")
    port = int(port_text) if port_text is not None else None
    if bracketed:
        if parse_ip(host) is None:
            raise _refuse("", f"host [{host}]", "an IPv6 address")
        return str(ipaddress.IPv6Address(host)), port
    host = host.lower()
    labels = host.split(".")
    if not host.isascii() or len(host) > MAX_HOST_CHARS or not all(_LABEL.fullmatch(label) for label in labels):
        raise _refuse("", f"host {host!r}", "a host name in plain letters (xn--... for others)")
    if _NUMBER.fullmatch(labels[-1]) and parse_ip(host) is None:
        raise _refuse("", f"host {host!r}", "an IPv4 address as four plain numbers")
    return host, port


def _cut(authority: str) -> tuple[str, str | None]:
    host, colon, port = authority.partition(":")
    return host, port if colon else None


def _refuse(where: str, found: str, expected: str, todo: str = "") -> ImageError:
    return ImageError(where, found, expected, todo, reason_code="refused_url")
