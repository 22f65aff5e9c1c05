"""Hostile URLs, names, redirects, and servers that cheat: each is refused, and nothing off the list is reached."""

import socket
import ssl
import threading
import time
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from http_server import Answer, Handler, WebServer, serve
from visionloop.errors import ImageError
from visionloop.web.download import Fetcher, make_fetcher

# TRIP is the port of a listener on loopback that nobody may reach, SITE the host and port of one that is allowed.
URLS = {
    # other schemes, and none
    "file:///etc/passwd": "no http",
    "ftp://allowed.example/a.jpg": "no http",
    "gopher://allowed.example:80/_GET": "no http",
    "dict://127.0.0.1:TRIP/info": "no http",
    "data:image/png;base64,AAAA": "no http",
    "javascript:alert(1)": "no http",
    "//allowed.example/a.jpg": "no http",
    "http:/allowed.example/a.jpg": "no http",
    "http:allowed.example": "no http",
    "": "no http",
    "a.jpg": "no http",
    # hosts that are not in the list, or look as if they were
    "http://127.0.0.1:TRIP/a.jpg": "port TRIP",
    "http://evil.example/a.jpg": "not in the list",
    "http://allowed.example.evil.example/": "not in the list",
    "http://evilallowed.example/": "not in the list",
    "http://cdn.example/a.jpg": "not in the list",
    "http://evilcdn.example/a.jpg": "not in the list",
    "http://allowed.example:22/": "port 22",
    "http://allowed.example:6379/": "port 6379",
    "http://localhost:TRIP/": "not in the list",
    "http://xn--allowd-cva.example/": "not in the list",
    "http://\u0430llowed.example/": "plain letters",
    "http://allowed\u3002example/": "plain letters",
    "http://\uff11\uff12\uff17.0.0.1/": "plain letters",
    # user names, backslashes, control characters, odd ports
    "http://allowed.example@127.0.0.1:TRIP/": "user name",
    "http://user:secretword@allowed.example/": "user name",
    "http://allowed.example:80@127.0.0.1:TRIP/": "user name",
    "http://127.0.0.1:TRIP\\@allowed.example/": "character",
    "http:\\\\127.0.0.1:TRIP\\": "character",
    "http://allowed.example/\r\nHost: evil": "character",
    "http://allowed.example/\tx": "character",
    "http://allowed.example\x00.evil.example/": "character",
    " http://127.0.0.1:TRIP/": "no http",
    "http://allowed.example:0/": "port '0'",
    "http://allowed.example:65536/": "port '65536'",
    "http://allowed.example:/": "port ''",
    "http://allowed.example:8o/": "port '8o'",
    "http://allowed.example:80:TRIP/": "port '80:TRIP'",
    "http://allowed.example./": "plain letters",
    "http://.allowed.example/": "plain letters",
    "http://allowed..example/": "plain letters",
    "http://allowed.example%2eevil.example/": "plain letters",
    "http:///a.jpg": "plain letters",
    "http://?x": "plain letters",
    "http://allowed.example#@127.0.0.1:TRIP/\\": "character",
    "http://allowed.example/" + "a" * 9000: "characters",
    # addresses in disguise: all of them mean 127.0.0.1, or nothing at all
    "http://2130706433:TRIP/": "four plain numbers",
    "http://0x7f000001:TRIP/": "four plain numbers",
    "http://0x7f.0.0.0x1:TRIP/": "four plain numbers",
    "http://017700000001:TRIP/": "four plain numbers",
    "http://0177.0.0.1:TRIP/": "four plain numbers",
    "http://127.1:TRIP/": "four plain numbers",
    "http://127.0.0.1.:TRIP/": "plain letters",
    "http://[::1]:TRIP/": "not in the list",
    "http://[::ffff:127.0.0.1]:TRIP/": "not in the list",
    "http://[fe80::1%25eth0]:TRIP/": "in brackets",
    "http://[::1:TRIP/": "in brackets",
    "http://[v1.fe80]:TRIP/": "in brackets",
    "http://0:TRIP/": "four plain numbers",
    "http://169.254.169.254/latest/meta-data/": "metadata",
}
# Names that are allowed, and where an attacker lets them point to.
NAMES = {
    "loopback.cdn.example": ("127.0.0.1", "loopback"),
    "loopback6.cdn.example": ("::1", "loopback"),
    "private.cdn.example": ("10.1.2.3", "private"),
    "unique.cdn.example": ("fd00::1", "private"),
    "link.cdn.example": ("169.254.1.1", "link-local"),
    "link6.cdn.example": ("fe80::1%1", "link-local"),
    "shared.cdn.example": ("100.64.0.1", "carrier-grade"),
    "metadata.cdn.example": ("169.254.169.254", "metadata"),
    "azure.cdn.example": ("168.63.129.16", "metadata"),
    "metadata6.cdn.example": ("fd00:ec2::254", "metadata"),
    "any.cdn.example": ("0.0.0.0", "unspecified"),
    "any6.cdn.example": ("::", "unspecified"),
    "mapped.cdn.example": ("::ffff:127.0.0.1", "embedded IPv4"),
    "nat64.cdn.example": ("64:ff9b::7f00:1", "embedded IPv4"),
    "sixtofour.cdn.example": ("2002:7f00:1::", "embedded IPv4"),
    "teredo.cdn.example": ("2001:0:7f00:1::", "embedded IPv4"),
    "many.cdn.example": ("224.0.0.1", "multicast"),
    "bench.cdn.example": ("198.18.0.1", "reserved"),
    "future.cdn.example": ("240.0.0.1", "reserved"),
    "odd6.cdn.example": ("4000::1", "reserved"),
}
# Where an allowed server redirects to.
REDIRECTS = {
    "http://127.0.0.1:TRIP/": "port TRIP",
    "//127.0.0.1:TRIP/": "port TRIP",
    "http://169.254.169.254/latest/": "metadata",
    "http://loopback.cdn.example:TRIP/": "loopback",
    "http://SITE@127.0.0.1:TRIP/": "user name",
    "http://127.1:TRIP/": "four plain numbers",
    "\\\\127.0.0.1:TRIP/": "redirects to",
    "/\t/127.0.0.1:TRIP/": "redirects to",
    "file:///etc/passwd": "no http",
    "/again": "more than 5 times",
}


class World:
    """An allowed server, a tripwire, DNS in the hands of an attacker, and a record of every connection tried."""

    def __init__(self, site: WebServer, tripwire: int) -> None:
        self.site, self.tripwire = site, tripwire
        self.tripped = 0
        self.tried: list[tuple[str, int]] = []
        self.names: dict[str, list[str]] = {name: [address] for name, (address, _) in NAMES.items()}

    def fill(self, text: str) -> str:
        return text.replace("TRIP", str(self.tripwire)).replace("SITE", self.site.host)

    def make_fetcher(self, *private: str, **options: Any) -> Fetcher:
        env = {
            "VISIONLOOP_PRIVATE_HOSTS": ",".join([self.site.host, *private]),
            "HTTP_PROXY": f"http://{self.site.host}",
        }
        hosts = [
            "allowed.example",
            "169.254.169.254",
            f"*.cdn.example:{self.tripwire}",
            "*.cdn.example",
            self.site.host,
        ]
        return make_fetcher(env, hosts, requests_per_s=1e6, **{"timeout_s": 2.0, **options})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr("visionloop.web.download.FIRST_WAIT_S", 0.001)
    look_up, connect = socket.getaddrinfo, socket.socket.connect
    with serve() as site, socket.create_server(("127.0.0.1", 0)) as listener:
        world = World(site, listener.getsockname()[1])

        def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if str(host) not in world.names:
                assert str(host)[0].isdigit() or ":" in str(host), f"{host} must not be asked for"
                return look_up(host, port, *args, **options)
            answers = world.names[str(host)]
            address = answers.pop(0) if len(answers) > 1 else answers[0]
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

        def record(self: socket.socket, address: Any) -> None:
            world.tried.append(tuple(address[:2]))
            if address[0] != "127.0.0.1":
                raise ConnectionRefusedError("this test reaches nothing but loopback")
            connect(self, address)

        def count() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return
                world.tripped += 1

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", record)
        threading.Thread(target=count, daemon=True).start()
        yield world
        listener.shutdown(socket.SHUT_RDWR)


def refuse(fetcher: Fetcher, url: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        fetcher.make_reader(url)(1_000_000)
    return caught.value


def test_hostile_urls_are_refused_before_any_connection(world: World) -> None:
    assert len(URLS) == 60
    fetcher = world.make_fetcher("127.0.0.1", "169.254.169.254")
    wrong = []
    for url, reason in URLS.items():
        error = refuse(fetcher, world.fill(url))
        if error.reason_code != "refused_url" or world.fill(reason) not in str(error) or "secretword" in str(error):
            wrong.append((url, str(error)))
    assert wrong == []
    assert (world.tried, world.tripped, world.site.targets) == ([], 0, [])


def test_names_that_point_to_private_addresses_are_refused(world: World) -> None:
    fetcher = world.make_fetcher()
    wrong = []
    for name, (_, reason) in NAMES.items():
        error = refuse(fetcher, f"http://{name}:{world.tripwire}/a.jpg")
        if error.reason_code != "refused_url" or reason not in error.found:
            wrong.append((name, str(error)))
    assert wrong == []
    assert (world.tried, world.tripped) == ([], 0)


def test_redirects_to_what_is_not_allowed_are_refused(world: World) -> None:
    fetcher = world.make_fetcher("127.0.0.1")
    wrong = []
    for location, reason in REDIRECTS.items():
        world.site.routes["/go"] = Answer(status=302, headers={"Location": world.fill(location)})
        world.site.routes["/again"] = Answer(status=307, headers={"Location": "/again"})
        error = refuse(fetcher, f"{world.site.url}/go")
        if error.reason_code != "refused_url" or world.fill(reason) not in str(error):
            wrong.append((location, str(error)))
    assert wrong == []
    assert set(world.tried) == {("127.0.0.1", world.site.port)}
    assert world.tripped == 0


def test_a_name_that_changes_its_address_wins_nothing(world: World) -> None:
    world.names["rebind.cdn.example"] = ["93.184.216.34", "127.0.0.1"]
    error = refuse(world.make_fetcher(), f"http://rebind.cdn.example:{world.tripwire}/a.jpg")
    assert error.found == "rebind.cdn.example is at a loopback address"
    assert (world.tried, world.tripped) == ([("93.184.216.34", world.tripwire)], 0)


def test_a_private_host_is_reached_when_it_is_named(world: World) -> None:
    world.site.routes["/a"] = Answer(b"image")
    world.names["nas.cdn.example"] = ["127.0.0.1"]
    named = f"http://nas.cdn.example:{world.site.port}/a"
    env = {"VISIONLOOP_PRIVATE_HOSTS": "nas.cdn.example, other.example"}
    fetcher = make_fetcher(env, [f"nas.cdn.example:{world.site.port}"])
    assert fetcher.make_reader(named)(100) == b"image"
    assert world.site.requests[0].headers["host"] == f"nas.cdn.example:{world.site.port}"
    without = make_fetcher({}, [f"nas.cdn.example:{world.site.port}"])
    assert refuse(without, named).todo == "If this host is yours, name it in VISIONLOOP_PRIVATE_HOSTS."


def gzip_bomb(member: bytes = zlib.compress(b"", 9, 31), size: int = 200_000_000) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(1_000_000)) for _ in range(size // 1_000_000)) + packer.flush()


CHEATS = [  # headers, body, reason code, what is found
    ({"Content-Encoding": "gzip"}, gzip_bomb(), "too_large", "is too large"),
    ({"Content-Encoding": "gzip"}, zlib.compress(b"", 9, 31) * 60_000, "too_large", "is too large"),
    ({"Content-Encoding": "gzip, gzip"}, b"x", "unreadable", "comes as 'gzip, gzip'"),
    ({"Content-Encoding": "br"}, b"x", "unreadable", "comes as 'br'"),
    ({"Content-Encoding": "zstd"}, b"x", "unreadable", "comes as 'zstd'"),
    ({"Content-Encoding": "gzip"}, b"no gzip", "unreadable", "is not the gzip"),
    ({"Content-Encoding": "gzip"}, zlib.compress(b"abc" * 99, 9, 31)[:-9], "unreadable", "was cut"),
    ({"Content-Length": "99999999"}, b"x", "too_large", "is too large"),
    ({"Content-Length": "500"}, b"x", "unreadable", "incomplete|closed"),
    ({"Content-Length": "-1"}, b"x", "unreadable", "connection failed"),
    ({"Transfer-Encoding": "chunked", "Content-Length": "3"}, b"FFFFFFFFFFFFFFFFFF\r\nx", "unreadable", "failed"),
    ({f"X-{i}": "x" * 60_000 for i in range(20)}, b"x", "unreadable", "connection failed"),
]


@pytest.mark.parametrize("cheat", CHEATS)
def test_bodies_that_cheat_are_refused(world: World, cheat: tuple[dict[str, str], bytes, str, str]) -> None:
    headers, body, code, found = cheat
    world.site.routes["/a"] = Answer(body, headers=headers, cut=len(body))
    with pytest.raises(ImageError, match=found) as caught:
        world.make_fetcher().fetch(f"{world.site.url}/a", 1_000_000)
    assert caught.value.reason_code == code


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_an_answer_that_drips_ends_at_its_deadline(world: World, begin: bytes) -> None:
    stop = threading.Event()

    def drip(handler: Handler) -> None:
        handler.wfile.write(begin)
        while not stop.wait(0.02):
            handler.wfile.write(b"x")

    world.site.routes["/a"] = drip
    began = time.monotonic()
    error = refuse(world.make_fetcher(timeout_s=0.2), f"{world.site.url}/a?token=abc")
    stop.set()
    assert (error.reason_code, error.found) == ("unreadable", "gave no whole answer within 0.2 s")
    assert "abc" not in str(error)
    assert 0.8 < time.monotonic() - began < 30  # four tries


def test_headers_with_secrets_stay_at_their_host(world: World) -> None:
    with serve({"/b": Answer(b"image")}) as other:
        env = {"VISIONLOOP_PRIVATE_HOSTS": "127.0.0.1"}
        hosts = [world.site.host, other.host]
        fetcher = make_fetcher(env, hosts, headers={"X-Key": "k"}, headers_host=f"{world.site.url}/list")
        world.site.routes["/go"] = Answer(status=302, headers={"Location": f"{other.url}/b", "Set-Cookie": "a=b"})
        assert fetcher.make_reader(f"{world.site.url}/go")(100) == b"image"
        assert [request.headers.get("x-key") for request in world.site.requests] == ["k"]
        assert [("x-key" in request.headers, "cookie" in request.headers) for request in other.requests] == [
            (False, False)
        ]


def write_certificate(folder: Path, name: str) -> Path:
    """Write a certificate of its own for a name, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now + timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption(), serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / f"{name}.pem"
    path.write_bytes(certificate.public_bytes(plain[1]) + key.private_bytes(plain[1], plain[2], plain[0]))
    return path


def test_tls_checks_the_name_although_the_address_is_connected(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    certificate = write_certificate(tmp_path, "photos.cdn.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: asked.append(str(name))
    world.names |= {"photos.cdn.example": ["127.0.0.1"], "other.cdn.example": ["127.0.0.1"]}
    with serve({"/a": Answer(b"image")}, context) as secure:
        hosts, env = [f"*.cdn.example:{secure.port}"], {"VISIONLOOP_PRIVATE_HOSTS": "*.cdn.example"}
        url = f"https://photos.cdn.example:{secure.port}/a"
        assert "no certificate that can be trusted" in refuse(make_fetcher(env, hosts), url).found
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        fetcher = make_fetcher(env, hosts)
        assert fetcher.make_reader(url)(100) == b"image"
        assert asked == ["photos.cdn.example"] * 2
        other = refuse(fetcher, f"https://other.cdn.example:{secure.port}/a")
        assert "Hostname mismatch" in other.found
        secure.routes["/down"] = Answer(status=302, headers={"Location": f"http://photos.cdn.example:{secure.port}/a"})
        assert "redirects from https to http" in refuse(fetcher, f"https://photos.cdn.example:{secure.port}/down").found
        assert secure.targets == ["/a", "/down"]
