"""What an RTSP camera may send to the decoder before its film begins."""

import pytest

from visionloop.ingest.video.cameras import Reach, hide_login, read_address
from visionloop.ingest.video.webstream import RtspReplies
from visionloop.web.download import explain_failure

OK = b"RTSP/1.0 200 OK\r\nCSeq: 1\r\n\r\n"
FOUND = b"RTSP/1.0 302 Found\r\nLocation: rtsp://10.0.0.1/\r\n\r\n"
SENT = "redirects to another address"


def relay(data: bytes, size: int = 1000) -> str:
    """Return the fault that is found in what a camera sends, in pieces of so many bytes."""
    replies = RtspReplies()
    return next((fault for i in range(0, len(data), size) if (fault := replies.find_fault(data[i : i + size]))), "")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (OK + FOUND, SENT),
        (FOUND.replace(b"\r", b""), SENT),
        (b"$\0\0\2ab" + FOUND, SENT),
        (b"\r$\0\0\2\n\n" + FOUND, SENT),
        (OK + b"$\0\0\0$\1\0\1\n\r\n" + FOUND, SENT),
        (b"RTSP/1.0 200 OK\r\n$\0\0\6RTSP/1CSeq: 1\r\n\r\n" + FOUND, SENT),
        (b"RTSP/1.0 200 OK\ncontent-LENGTH: 3\n\n$\0\0" + FOUND, SENT),
        (b"ANNOUNCE a RTSP/1.0\r\nContent-Length: 1\r\n\r\n$" + FOUND, SENT),
        (b"RT\rSP/1.0 3\r02 Found\r\r\n", SENT),
        (b"RTSP/1.0\t302\n", SENT),
        (b" RTSP/1.0 302 Found\n", "sends a status that is not plain"),
        (b"RTSP/2 302 Found\n", "sends a status that is not plain"),
        (b"RTSP/1.0 0302 Found\n", "sends a status that is not plain"),
        (b"rtsp/1.0 +302 Found\n", "sends a status that is not plain"),
        (b"RTSP/1.0 200 OK\nContent-Length: 0x9\n", "sends a length that is not plain"),
        (b"RTSP/1.0 200 OK\nContent-Length: 9\ncontent-length: 1\n", "sends a length that is not plain"),
        (b"RTSP/1.0 200 OK\nContent-Type: a\n Content-Length: 9\n", "sends a length that is not plain"),
        (b"RTSP/1.0 200 OK\n\0\n", "sends a control character in a reply"),
        (b"RTSP/1.0 200 OK\nServer: " + b"x" * 20_000, "sends a line that is too long"),
        (OK + b"SET_PARAMETER rtsp://c/ RTSP/1.0\r\nCSeq: 1\r\n folded\r\n\r\n" + OK, ""),
        (b"RTSP/1.0 401 Unauthorized\r\nContent-Length: 30\r\n\r\nRTSP/1.0 302 Found in the body" + OK, ""),
    ],
)
def test_the_relay_lets_no_redirect_through_however_it_is_cut(data: bytes, fault: str) -> None:
    assert {relay(data, size) for size in (1, 2, 3, 7, 1000, 30_000)} == {fault}


def test_the_film_may_hold_any_bytes_once_it_was_asked_for() -> None:
    replies = RtspReplies()
    replies.note_request(b"SETUP rtsp://c/PLAY RTSP/1.0\r\n\r\n")
    assert replies.find_fault(b"RTSP/1.0 302 Found\r\n") == SENT
    replies.note_request(b"PLAY rtsp://c/ RTSP/1.0\r\n\r\n")
    assert replies.find_fault(OK + b"$\0\0\4\nRTSP/1.0 302 by chance, in the film\n" + bytes(20_000)) == ""


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("rtsp://cam/user=admin_password=se_cret_channel=1", "rtsp://cam/user=admin_password=***_channel=1"),
        ("rtsp://cam/live/Token=secret/1?password=secret", "rtsp://cam/live/Token=***/1"),
        ("rtsp://cam/a;pwd=secret;b", "rtsp://cam/a;pwd=***;b"),
        ("rtsp://me:secret@cam/key=", "rtsp://***@cam/key=***"),
        ("rtsp://cam/stream=1", "rtsp://cam/stream=1"),
    ],
)
def test_a_password_in_the_path_of_a_camera_is_not_shown(path: str, shown: str) -> None:
    assert hide_login(path) == shown


def test_a_password_in_path_or_query_is_a_secret_of_the_address() -> None:
    assert set(read_address("rtsp://cam/user=a_password=path1?passwd=query1&user=b", Reach({}, "cam"))[2]) == {
        "path1",
        "query1",
    }


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("illegal status line: bytearray(b'\\x00\\xffno')", "illegal status line: '\\x00\\xffno'"),
        ("x" * 5000, "x" * 120 + "..."),
        ("", "ConnectionError"),
    ],
)
def test_why_a_connection_failed_is_one_short_line(said: str, shown: str) -> None:
    assert explain_failure(ConnectionError(said)) == f"the connection failed ({shown})"
