"""Videos made to do harm: each is refused as expected, opens no other file, reaches no network."""

import random
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from videos import RED, Film, write_video
from visionloop.ingest.sources import Item, SourceContext, read_source
from visionloop.params import Ingest, VideoSource
from visionloop.records import Rejected

SECRET = "secret.mp4"  # a sound video beside the hostile one: whoever opens it gives red frames


def write_hls(path: Path, target: str) -> None:
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n")


def write_dash(path: Path, target: str) -> None:
    path.write_text(
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles="urn:mpeg:dash:profile:'
        'isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
        f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    )


def write_sdp(path: Path, port: int) -> None:
    path.write_text(f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 33\n")


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.mp4", b"x" * 1000)


def write_reference(path: Path, target: str) -> None:
    """QuickTime whose pictures lie in another file: an alias in `dref` instead of the data itself."""
    data = write_video(path).read_bytes()
    name = target.encode()
    # Type 2 (absolute path), type -1: the end; before them 150 bytes of an alias record that nobody reads.
    alias = bytes(4) + bytes(150) + struct.pack(">HH", 2, len(name)) + name + struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I4s", 8 + len(alias), b"alis") + alias
    dref = bytes(4) + struct.pack(">I", 1) + entry
    path.write_bytes(replace_box(data, [b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"], dref))


def replace_box(data: bytes, names: list[bytes], content: bytes) -> bytes:
    """Give the first box at a path of names another content, and mend the sizes above it."""
    at = 0
    while data[at + 4 : at + 8] != names[0]:
        at += struct.unpack(">I", data[at : at + 4])[0]
    size = struct.unpack(">I", data[at : at + 4])[0]
    inner = content if len(names) == 1 else replace_box(data[at + 8 : at + size], names[1:], content)
    return data[:at] + struct.pack(">I4s", 8 + len(inner), names[0]) + inner + data[at + size :]


def read_box(data: bytes, name: bytes) -> tuple[int, int]:
    """Where the content of the first box of a name begins and ends; the name may be anywhere."""
    at = data.index(name) - 4
    return at + 8, at + struct.unpack(">I", data[at : at + 4])[0]


def patch(path: Path, name: bytes, offset: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    start, _ = read_box(bytes(data), name)
    data[start + offset : start + offset + len(value)] = value
    path.write_bytes(data)


def write_huge_header(path: Path, side_px: int) -> None:
    """An AVI of 64 x 48 that says in every header that it has so many pixels."""
    data = write_video(path.with_name("x.avi"), Film(codec="ffv1", pix_fmt="yuv420p")).read_bytes()
    path.with_name("x.avi").unlink()
    path.write_bytes(data.replace(struct.pack("<II", 64, 48), struct.pack("<II", side_px, side_px)))


def write_giant_claim(path: Path) -> None:
    """Three seconds that claim to last 30,000 years."""
    data = write_video(path, format="matroska").read_bytes()
    at = data.index(b"\x44\x89\x88") + 3  # Duration, in milliseconds, as a double
    path.write_bytes(data[:at] + struct.pack(">d", 1e15) + data[at + 8 :])


def write_billion_frames(path: Path) -> None:
    """A table of times for four billion frames."""
    write_video(path)
    patch(path, b"stts", 8, b"\xff\xff\xff\xff")
    patch(path, b"stsz", 8, b"\xff\xff\xff\xff")


def write_absurd_rate(path: Path) -> None:
    """Two thousand frames, all in the first millisecond."""
    film = Film(frames=Film([RED], 1.0, fps=2000, size_hw=(16, 16)).draw(), fps=1_000_000, codec="libx264")
    write_video(path.with_name("x.mkv"), film, format="mp4").rename(path)


def write_cut(path: Path) -> None:
    """The index of an MP4 stands at its end: cut there, nothing can be found."""
    data = write_video(path).read_bytes()
    path.write_bytes(data[: data.index(b"moov") + 40])


def write_picture(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (2000, 2000)).save(path, "PNG")


def write_subtitles(path: Path) -> None:
    path.write_text(
        "[Script Info]\nScriptType: v4.00+\n[Events]\nDialogue: 0,0:00:00.00,9:59:59.99,Default,,0,0,0,,x\n"
    )


def write_subtitle_index(path: Path) -> None:
    """VobSub: a text that names where its .sub lies; FFmpeg opens a file of the same name."""
    path.write_text("# VobSub index file, v7 (do not modify this line!)\nsize: 720x576\ntimestamp: 00:00:00:000\n")
    path.with_suffix(".sub").write_bytes(b"\x00\x00\x01\xba" * 100)


TRICKS: dict[str, tuple[Callable[[Path, int], object], str]] = {
    "playlist of a local file": (lambda p, port: write_hls(p, f"file://{p.parent}/{SECRET}"), "not_a_video"),
    "playlist of passwords": (lambda p, port: write_hls(p, "file:///etc/passwd"), "not_a_video"),
    "playlist of a server": (lambda p, port: write_hls(p, f"http://127.0.0.1:{port}/x.ts"), "not_a_video"),
    "playlist beside it": (lambda p, port: write_hls(p, SECRET), "not_a_video"),
    "concat script": (
        lambda p, port: p.write_text(f"ffconcat version 1.0\nfile {p.parent}/{SECRET}\n"),
        "not_a_video",
    ),
    "concat beside it": (lambda p, port: p.write_text(f"ffconcat version 1.0\nfile {SECRET}\n"), "not_a_video"),
    "dash manifest": (lambda p, port: write_dash(p, f"http://127.0.0.1:{port}/x.mp4"), "not_a_video"),
    "session description": (write_sdp, "not_a_video"),
    "reference to another file": (lambda p, port: write_reference(p, f"{p.parent}/{SECRET}"), "no_video"),
    "huge dimensions": (lambda p, port: write_huge_header(p, 9_000), "too_large"),
    "impossible dimensions": (lambda p, port: write_huge_header(p, 60_000), "damaged"),
    "zip": (lambda p, port: write_zip(p), "not_a_video"),
    "picture": (lambda p, port: write_picture(p), "not_a_video"),
    "subtitles": (lambda p, port: write_subtitles(p), "not_a_video"),
    "subtitle index": (lambda p, port: write_subtitle_index(p), "not_a_video"),
    "no index": (lambda p, port: write_cut(p), "damaged"),
    "no byte": (lambda p, port: p.write_bytes(b""), "empty"),
    "endless claim": (lambda p, port: write_giant_claim(p), "damaged"),
    "billions of frames": (lambda p, port: write_billion_frames(p), "damaged"),
    "absurd frame rate": (lambda p, port: write_absurd_rate(p), "too_many_frames"),
    "other codec": (
        lambda p, port: write_video(p, Film(codec="qtrle", pix_fmt="rgb24"), format="mov"),
        "not_a_video",
    ),
    "noise": (lambda p, port: p.write_bytes(random.Random(0).randbytes(50_000)), "not_a_video"),
}
# Frames that are as they should be, before the lie was found.
GIVE_FRAMES = {"endless claim": 3, "absurd frame rate": 1}


def read(home: Path, path: str) -> tuple[list[Item], list[Rejected]]:
    source = VideoSource(kind="video", path=path, name="cam", label="x")
    offered = list(read_source(source, SourceContext(home, home / ".visionloop", {}, Ingest())))
    return [o for o in offered if isinstance(o, Item)], [o for o in offered if isinstance(o, Rejected)]


def test_every_hostile_video_is_refused_as_expected(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        port = listener.getsockname()[1]
        for name, (write, _) in TRICKS.items():
            write(folder / f"{name}.mp4", port)
        write_video(folder / SECRET, Film([RED]))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

        items, rejected = read(tmp_path, "v")

        with pytest.raises(TimeoutError):
            listener.accept()
    found = {r.origin.removeprefix("cam:").removesuffix(".mp4"): r.code for r in rejected}
    assert found == {name: code for name, (_, code) in TRICKS.items()}
    counts = {name: sum(f"cam:{name}.mp4#" in i.origin for i in items) for name in TRICKS}
    assert {name: n for name, n in counts.items() if n} == GIVE_FRAMES
    assert [i.origin for i in items if SECRET in i.origin] == [f"cam:{SECRET}#t=0.000"]
    ours = tmp_path / ".visionloop"
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if ours not in (p, *p.parents)}
    assert after == before
    assert not any("/etc" in r.reason or str(tmp_path) in r.reason for r in rejected)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_damaged_bytes_anywhere_never_stop_a_pull(name: str, tmp_path: Path) -> None:
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    whole = write_video(tmp_path / name, Film(codec=codec, seconds=0.5)).read_bytes()
    chance = random.Random(name)
    (tmp_path / "v").mkdir()
    for number in range(40):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 4, 40))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        cut = chance.choice((len(data), chance.randrange(len(data))))
        (tmp_path / f"v/{number:03d}{Path(name).suffix}").write_bytes(data[:cut])
    write_video(tmp_path / f"v/z{Path(name).suffix}", Film([RED], codec=codec))
    items, rejected = read(tmp_path, "v")
    assert items[-1].origin == f"cam:z{Path(name).suffix}#t=0.000"
    codes = {r.code for r in rejected}
    assert codes <= {"not_a_video", "no_video", "damaged", "too_large", "too_many_frames", "empty"}
    assert rejected


def test_a_playlist_that_is_named_as_one_is_refused_too(tmp_path: Path) -> None:
    write_video(tmp_path / "secret.ts", Film([RED], codec="mpeg2video", fps=25))
    write_hls(tmp_path / "list.m3u8", "secret.ts")
    items, rejected = read(tmp_path, "list.m3u8")
    assert (items, [r.code for r in rejected]) == ([], ["not_a_video"])
