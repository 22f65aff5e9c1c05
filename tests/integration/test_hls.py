"""Live playlists (HLS): a server on loopback that adds a piece whenever the newest was asked for; and hostile ones."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from fakes import make_bundle
from http_server import Answer, Handler, WebServer, serve
from source_runs import read_video
from videos import RED, WHITE
from visionloop.cli.cameras import allow_typed_host
from visionloop.errors import ImageError, SourceError
from visionloop.ingest.video.hls import Piece, Playlist, _Held, parse_playlist
from visionloop.ingest.video.webstream import Arrivals
from visionloop.predict.connection import WatchPlan
from visionloop.predict.files import Sampling
from visionloop.predict.live import Watch
from visionloop.predict.several import Answerer
from visionloop.predictor import Predictor

LIMIT_S = 120.0  # no test waits for it: it ends one that would wait for ever
NUM, PIECE_S, FPS, MOST = 120, 0.4, 10, 1000
HEAD = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:1\n"
KIND = {"Content-Type": "application/vnd.apple.mpegurl"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    make_bundle(folder)
    return Answerer(Predictor.load(folder, threads=1))


def write_pieces(folder: Path, kind: str) -> list[bytes]:
    """A film, red for its first half and white for its second, in pieces; of MP4 the head comes first."""
    folder.mkdir()
    suffix = "ts" if kind == "mpegts" else "m4s"
    options = {
        "hls_time": str(PIECE_S),
        "hls_segment_type": kind,
        "hls_list_size": "0",
        "hls_segment_filename": str(folder / f"%03d.{suffix}"),
        "hls_fmp4_init_filename": "init.mp4",
    }
    with av.open(str(folder / "all.m3u8"), "w", format="hls", options=options) as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"g": str(round(PIECE_S * FPS)), "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(round(NUM * PIECE_S * FPS)):
            color = RED if number < NUM * PIECE_S * FPS / 2 else WHITE
            picture = np.full((48, 64, 3), color, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    heads = [folder / "init.mp4"] if kind == "fmp4" else []
    return [path.read_bytes() for path in [*heads, *sorted(folder.glob(f"*.{suffix}"))]]


class Live:
    """A server whose playlist holds three pieces, and moves on when the newest was fetched.

    Red pieces come, then white ones. A master playlist lists two sizes.
    """

    def __init__(self, pieces: list[bytes], kind: str) -> None:
        self.head = '#EXT-X-MAP:URI="/init.mp4"\n' if kind == "fmp4" else ""
        heads = {"/init.mp4": Answer(pieces.pop(0))} if self.head else {}
        self.pieces, self.newest, self.white_from = pieces, 2, MOST
        self.routes: dict[str, Any] = {"/master.m3u8": self.list_variants, "/sub/live.m3u8": self.list, **heads}
        self.routes |= {f"/sub/{number}.seg": self.send for number in range(MOST)}

    def turn_white(self) -> None:
        self.white_from = min(self.white_from, self.newest + 1)

    def list_variants(self, handler: Handler) -> Answer:
        low, high = (
            "#EXT-X-STREAM-INF:BANDWIDTH={},RESOLUTION={}\n{}\n".format(*one)
            for one in ((100, "16x16", "sub/too-small.m3u8"), (900, "64x48", "sub/live.m3u8"))
        )
        return Answer(f"{HEAD}{low}{high}".encode(), headers=KIND)

    def list(self, handler: Handler) -> Answer:
        rows = "".join(f"#EXTINF:{PIECE_S},\n{number}.seg\n" for number in range(self.newest - 2, self.newest + 1))
        return Answer(f"{HEAD}#EXT-X-MEDIA-SEQUENCE:{self.newest - 2}\n{self.head}{rows}".encode(), headers=KIND)

    def send(self, handler: Handler) -> Answer:
        number = int(handler.path.removeprefix("/sub/").removesuffix(".seg"))
        self.newest = max(self.newest, number + 1)
        place = number if number < self.white_from else number - self.white_from
        return Answer(self.pieces[place % (NUM // 2) + (NUM // 2 if number >= self.white_from else 0)])


@pytest.mark.parametrize("kind", ["mpegts", "fmp4"])
def test_a_live_playlist_is_watched_piece_by_piece(kind: str, tmp_path: Path, network: Answerer) -> None:
    pieces = write_pieces(tmp_path / "pieces", kind)
    live = Live(pieces, kind)
    with serve(live.routes) as site:
        path = f"{site.url}/master.m3u8"
        plan = WatchPlan(path, allow_typed_host(path, {}), Sampling(0.05, 0.0), LIMIT_S)
        watch, told = Watch(plan, network), list[str]()
        for line in watch.run(watch.connect()):
            told += [line["prediction"]] if line and line["kind"] == "change" else []
            if told[-1:] == ["a"]:
                live.turn_white()
            if told[-1:] == ["c"]:
                watch.stop("stopped")
        watch.end()
    assert told == ["a", "c"]
    asked = [int(target.split("/")[-1].removesuffix(".seg")) for target in site.targets if target.endswith(".seg")]
    assert asked[0] == 2 and asked == sorted(set(asked)), "from the newest on, each once, in order"
    assert not any("too-small" in target for target in site.targets)


def test_a_source_reads_a_live_playlist_too(tmp_path: Path) -> None:
    pieces = write_pieces(tmp_path / "pieces", "mpegts")
    with serve(Live(pieces, "mpegts").routes) as site:
        env = {"VISIONLOOP_PRIVATE_HOSTS": "127.0.0.1"}
        wishes = {"path": f"{site.url}/sub/live.m3u8", "label": "yard", "every_s": 0.1, "watch_s": 1.0}
        items, rejected, _ = read_video(tmp_path, env, **wishes)
        assert (len(items) > 0, rejected) == (True, [])
        _, rejected, _ = read_video(tmp_path, env, **wishes, max_video_bytes=2000)
    assert [one.code for one in rejected] == ["too_large"]


def open_playlist(site: WebServer, text: str, network: Answerer, stall_s: float = LIMIT_S) -> None:
    site.routes["/a.m3u8"] = Answer(text.encode(), headers={"Content-Type": "text/plain"})
    path = f"{site.url}/a.m3u8"
    watch = Watch(WatchPlan(path, allow_typed_host(path, {}), Sampling(), LIMIT_S, stall_s=stall_s), network)
    list(watch.run(watch.connect()))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no playlist"),
        ("#EXTINF:1,\na.ts", "is no playlist"),
        (f"{HEAD}", "is a playlist, and of no live stream"),
        (f"{HEAD}#EXTINF:1,\na.ts\n#EXT-X-ENDLIST", "is a playlist, and of no live stream"),
        (f"{HEAD}#EXT-X-STREAM-INF:BANDWIDTH=1\na.m3u8", "is a playlist, and of no live stream"),
        (f'{HEAD}#EXT-X-KEY:METHOD=AES-128,URI="http://h/k"\n#EXTINF:1,\na.ts', "is encrypted"),
        (f"{HEAD}#EXT-X-BYTERANGE:9@0\n#EXTINF:1,\na.ts", "names parts of files"),
        (f'{HEAD}#EXT-X-MAP:URI="i.mp4",BYTERANGE="9@0"\n#EXTINF:1,\na.ts', "names parts of files"),
        (f"{HEAD}#EXTINF:-1,\na.ts", "has the number '-1'"),
        (f"{HEAD}#EXTINF:1e999,\na.ts", "has the number '1e999'"),
        (f"{HEAD}#EXTINF:1,\na b.ts", "names an address that is not plain"),
        (f"{HEAD}#EXTINF:1,\nfile:///etc/passwd", "no http or https URL"),
        (f"{HEAD}#EXTINF:1,\nhttp://169.254.169.254/latest", "host 169.254.169.254 is not in the list of hosts"),
        (f"{HEAD}#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://localhost:1/a.m3u8", "host localhost is not in the list"),
        (f'{HEAD}#EXT-X-MAP:URI="//localhost:1/i"\n#EXTINF:1,\na.ts', "host localhost is not in the list of hosts"),
        (f"{HEAD}#EXTINF:1,\nredirect.ts", "redirects to localhost:1/secret: host localhost is not in the list"),
        (f"{HEAD}#EXTINF:1,\nmissing.ts", "answered 404"),
        (HEAD + "#EXTINF:1,\na.ts\n" * 80_000, "is too large"),
    ],
)
def test_what_leads_elsewhere_or_cannot_be_read_is_refused_in_one_line(
    text: str, reason: str, network: Answerer
) -> None:
    away = Answer(status=302, headers={"Location": "http://localhost:1/secret"})
    with serve({"/redirect.ts": away}) as site, pytest.raises(SourceError, match=reason):
        open_playlist(site, text, network)


def test_pieces_that_are_no_video_are_an_error(network: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.predict.connection.NO_PICTURE_S", 1.0)
    with (
        serve({"/rubbish.ts": Answer(b"x" * 100_000)}) as site,
        pytest.raises(SourceError, match=r"no frame for 2 s|gives no video"),
    ):
        open_playlist(site, f"{HEAD}#EXTINF:1,\nrubbish.ts", network, stall_s=2.0)


def test_a_playlist_is_read_as_it_is_written() -> None:
    url = "https://h.example/live/a.m3u8?token=1"
    text = "\ufeff#EXTM3U\r\n#EXT-X-TARGETDURATION:600\r\n#EXT-X-MEDIA-SEQUENCE:1764400000000000001\r\n"
    text += "#EXT-X-KEY:METHOD=NONE\r\n#EXTINF:2.5,title, and more\r\nb.ts?k=v\r\n#EXTINF:900\r\n/c.ts\r\n"
    assert parse_playlist(text, url) == Playlist(
        (
            Piece(1764400000000000001, 2.5, "https://h.example/live/b.ts?k=v", None),
            Piece(1764400000000000002, 60.0, "https://h.example/c.ts", None),
        ),
        60.0,
    )
    with pytest.raises(ImageError, match="leads from https to another scheme"):
        parse_playlist("#EXTM3U\n#EXTINF:1,\nhttp://h.example/c.ts", url)


def test_of_a_long_playlist_the_newest_are_read_and_gaps_are_left_out() -> None:
    rows = "#EXTINF:2.000000000000000444,\nold%2F.ts\n" * 50_000
    text = f"{HEAD}{rows}#EXTINF:2,\na.ts\n#EXT-X-GAP\n#EXTINF:2,\nb.ts\n#EXTINF:2,\nc.ts\n"
    found = parse_playlist(text, "https://h.example/a.m3u8").pieces
    assert [piece.number for piece in found] == [49_998, 49_999, 50_000, 50_002], "those that can be shown, and one"
    assert [piece.url for piece in found[2:]] == ["https://h.example/a.ts", "https://h.example/c.ts"]
    variants = "#EXT-X-STREAM-INF:BANDWIDTH=1\na.m3u8\n" * 101
    with pytest.raises(ImageError, match="lists more than 100 streams"):
        parse_playlist(HEAD + variants, "https://h.example/a.m3u8")


def test_a_piece_that_nobody_wants_any_more_is_not_received() -> None:
    """A server that sends slowly would leave a thread, and what it holds, for each connection."""
    held = _Held("h.example/1.ts", closing := threading.Event(), Arrivals())
    held.write(b"1")
    closing.set()
    with pytest.raises(ImageError, match="is not wanted any more"):
        held.write(b"2")
    assert held.getvalue() == b"1"


def test_pieces_on_another_host_are_watched_when_it_is_named(tmp_path: Path, network: Answerer) -> None:
    pieces = write_pieces(tmp_path / "pieces", "mpegts")
    with serve(Live(pieces, "mpegts").routes) as cdn:
        there = f"localhost:{cdn.url.rpartition(':')[2]}"
        master = f"{HEAD}#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://{there}/sub/live.m3u8\n"
        with serve({"/a.m3u8": Answer(master.encode(), headers=KIND)}) as site:
            path = f"{site.url}/a.m3u8"
            env = {"VISIONLOOP_PRIVATE_HOSTS": "127.0.0.1 localhost"}
            plan = WatchPlan(path, env, Sampling(0.05, 0.0), LIMIT_S, frames=3)
            with pytest.raises(SourceError) as caught:
                Watch(plan, network).connect()
            assert caught.value.found == "host localhost is not in the list of hosts"
            assert caught.value.todo == (
                "If it belongs to the stream: `--host localhost`, or `predict.hosts` in params.yaml."
            )
            with pytest.raises(SourceError, match=f"--host {there}`"):
                Watch(replace(plan, hosts=("localhost",)), network).connect()
            watch = Watch(replace(plan, hosts=(there,)), network)
            list(watch.run(watch.connect()))
            assert watch.num_answered == 3
        live = HEAD + f"#EXTINF:1,\nhttp://{there}/sub/0.seg\n"
        with serve({"/a.m3u8": Answer(live.encode(), headers=KIND)}) as site:
            plan = replace(plan, path=f"{site.url}/a.m3u8", is_one_of_several=True)
            watch = Watch(plan, network)
            with pytest.raises(SourceError, match="--host localhost`"):
                list(watch.run(watch.connect()))
