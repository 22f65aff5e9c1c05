import asyncio
import threading
import tracemalloc
from collections.abc import AsyncIterator, Sequence

import pytest
from fastapi import Request
from starlette.types import Message

from visionloop.serving import body as body_module
from visionloop.serving.body import Inbox, Limits, RequestError, Upload

LIMITS = Limits(max_body_bytes=1000, max_files=3, max_held_bytes=1500, body_timeout_s=0.2)
FORM = "multipart/form-data; boundary=x"


def make_request(chunks: Sequence[bytes], delay_s: float = 0.0, **headers: str) -> Request:
    async def messages() -> AsyncIterator[Message]:
        for chunk in chunks:
            await asyncio.sleep(delay_s)
            yield {"type": "http.request", "body": chunk, "more_body": True}
        yield {"type": "http.request", "body": b"", "more_body": False}

    stream = messages()
    names = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": names}, lambda: anext(stream))


def make_part(head: str, data: bytes = b"abc") -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + data + b"\r\n"


def receive(request: Request, inbox: Inbox | None = None) -> list[Upload]:
    async def run() -> list[Upload]:
        async with (inbox or Inbox(LIMITS)).receive(request) as uploads:
            return uploads

    return asyncio.run(run())


def refuse(request: Request, inbox: Inbox | None = None) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        receive(request, inbox)
    return caught.value.status, caught.value.reason_code


def test_a_raw_body_is_one_upload_whatever_its_declared_type() -> None:
    assert receive(make_request([b"ab", b"c"], content_type="application/json")) == [Upload(None, b"abc")]


def test_form_gives_its_files_in_order_and_leaves_other_fields() -> None:
    body = (
        make_part('name="any"; filename="one.png"', b"1")
        + make_part('name="note"', b"hello")
        + make_part('name="files"', b"2")
        + b"--x--\r\n"
    )
    expected = [Upload("one.png", b"1"), Upload(None, b"2")]
    assert receive(make_request([body], content_type=FORM)) == expected
    byte_by_byte = [body[i : i + 1] for i in range(len(body))]
    assert receive(make_request(byte_by_byte, content_type=FORM)) == expected


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("../../etc/passwd", "passwd"), ("a\x07b.png", "ab.png"), ("n" * 500, "n" * 120), ("dir\\file.png", "file.png")],
)
def test_file_names_lose_folders_and_control_characters(sent: str, kept: str) -> None:
    body = make_part(f'name="file"; filename="{sent}"') + b"--x--\r\n"
    assert receive(make_request([body], content_type=FORM))[0].name == kept


@pytest.mark.parametrize(
    "body",
    [
        b"no form at all",
        make_part('name="file"; filename="a"'),
        b"--x\r\nContent-Disposition\x00: y\r\n\r\nabc\r\n--x--\r\n",
        b"--x\r\n" + b"A: b\r\n" * 100,
    ],
)
def test_a_malformed_or_cut_form_is_refused(body: bytes) -> None:
    assert refuse(make_request([body], content_type=FORM)) == (400, "bad_form")


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/mixed; boundary=x", FORM + "y" * 2000])
def test_a_form_without_a_usable_boundary_is_refused(kind: str) -> None:
    assert refuse(make_request([b"abc"], content_type=kind)) == (400, "bad_form")


def test_nothing_to_answer_is_refused() -> None:
    assert refuse(make_request([])) == (400, "empty")
    left_empty = make_part('name="file"; filename=""', b"") + make_part('name="note"') + b"--x--\r\n"
    assert refuse(make_request([left_empty], content_type=FORM)) == (400, "empty")


def test_too_many_parts_are_refused() -> None:
    body = make_part('name="file"; filename="a"', b"") * 4 + b"--x--\r\n"
    assert len(body) < LIMITS.max_body_bytes
    assert refuse(make_request([body], content_type=FORM)) == (413, "too_many_files")


def test_the_size_limit_holds_for_declared_and_for_streamed_bytes() -> None:
    assert receive(make_request([b"a" * 1000])) == [Upload(None, b"a" * 1000)]
    assert refuse(make_request([b"a"], content_length="1001")) == (413, "body_too_large")
    assert refuse(make_request([b"a" * 600] * 2)) == (413, "body_too_large")
    assert refuse(make_request([b"a" * 600] * 2, content_length="10")) == (413, "body_too_large")


def test_a_compressed_body_is_refused() -> None:
    assert refuse(make_request([b"abc"], content_encoding="gzip")) == (415, "encoding_not_supported")


def test_a_slow_body_is_refused_after_the_time_limit() -> None:
    assert refuse(make_request([b"a"] * 50, delay_s=0.02)) == (408, "too_slow")


def test_bytes_of_all_requests_together_are_limited_and_given_back() -> None:
    inbox = Inbox(LIMITS)

    async def hold_one() -> None:
        async with inbox.receive(make_request([b"a" * 900])):
            assert inbox.held_bytes == 900
            with pytest.raises(RequestError) as caught:
                async with inbox.receive(make_request([b"a" * 900])):
                    pass
            assert (caught.value.status, inbox.held_bytes) == (503, 900)

    asyncio.run(hold_one())
    assert inbox.held_bytes == 0
    assert refuse(make_request([b"a" * 1001]), inbox) == (413, "body_too_large")
    assert refuse(make_request([b"a"] * 50, delay_s=0.02), inbox) == (408, "too_slow")
    assert inbox.held_bytes == 0


def test_json_of_very_many_values_is_refused_before_it_takes_memory() -> None:
    body = b'{"images": [' + b"[]," * 300_000 + b"[]]}"
    request = make_request([body])
    tracemalloc.start()
    try:
        assert refuse(request, Inbox(Limits())) == (400, "bad_json")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_a_large_body_is_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def load(data: bytes) -> object:
        threads.append(threading.current_thread() is threading.main_thread())
        return {"image": "aGk="}

    monkeypatch.setattr(body_module.json, "loads", load)
    for spaces in (10, 2_000_000):
        request = make_request([b"{" + b" " * spaces + b'"image": "aGk="}'])
        assert receive(request, Inbox(Limits())) == [Upload(None, b"hi")]
    assert threads == [True, False]
