"""Reads the body of a request: raw bytes, a multipart form or JSON, in pieces and within limits. Decodes no image.

The format of an image follows from its bytes, not from the content type that the client declares.
"""

import asyncio
import base64
import binascii
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from visionloop.errors import VisionLoopError, shorten

FILE_FIELDS = (b"file", b"files")
MAX_NAME_CHARS = 120
LARGE_BYTES = 1_000_000
MAX_JSON_MARKS = 10_000  # of lists, objects and commas between them: each becomes an object in memory
IMAGES_FORM = '{"image": "<base64>"} or {"images": ["<base64>", ...]}'
NO_BOUNDARY = "Do not set the Content-Type yourself: the HTTP library writes it, with the boundary that it chose."
URL_LETTERS = str.maketrans("-_", "+/")
# A refused client goes on sending for a moment. Closing at once would reset its connection before it reads the answer.
DISCARD_S = 2.0
DISCARD_BYTES = 64_000_000


@dataclass(frozen=True)
class Limits:
    """The limits of one server. `max_held_bytes` is for the bodies of all requests together.

    `max_pixels` None: the limit of the model in use.
    """

    max_body_bytes: int = 20_000_000
    max_pixels: int | None = 16_000_000
    max_video_bytes: int = 200_000_000
    max_video_s: float = 600.0
    max_batch: int = 32
    max_queue: int = 256
    max_files: int = 64
    max_held_bytes: int = 320_000_000
    body_timeout_s: float = 30.0
    deadline_s: float = 30.0
    stuck_s: float = 60.0
    cache_bytes: int = 0


@dataclass(frozen=True)
class Upload:
    """One file of a request. `name` is what the client called it, printable and without folders; None when raw.

    `in_list`: the client sent a list, and wants one back, even if it has one image.
    """

    name: str | None
    data: bytes
    in_list: bool = False


class RequestError(VisionLoopError, ValueError):
    """A request that cannot be answered; `status` is its HTTP status, `reason_code` is stable."""

    where_from = "request"

    def __init__(
        self,
        found: str,
        expected: str = "",
        todo: str = "",
        *,
        status: int = 400,
        reason_code: str = "bad_request",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(self.where_from, found, expected, todo)
        self.status, self.reason_code, self.headers = status, reason_code, headers or {}


Value_co = TypeVar("Value_co", covariant=True)
Read = TypeVar("Read")


class BodyReader(Protocol[Value_co]):
    def feed(self, chunk: bytes) -> None: ...
    def finish(self) -> Value_co: ...


class Inbox:
    """Reads the bodies of requests and keeps count of the bytes held for all of them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held_bytes = 0

    def receive(
        self, request: Request, check: Callable[[], None] = lambda: None
    ) -> contextlib.AbstractAsyncContextManager[list[Upload]]:
        """Read a request's uploads; their bytes count as held until the context ends.

        `check` may raise before anything is read: a full server refuses cheaply.

        Raises:
            RequestError: too large, too slow, malformed, or nothing in it.
            ClientDisconnect: the client went away.
        """
        return self.receive_by(request, partial(_make_reader, request.headers, self.limits), check)

    async def receive_json(self, request: Request, expected: str, max_bytes: int) -> object:
        """Read a small body of JSON. Raises as `receive`; `expected` is for the message."""
        make_reader = partial(WholeReader, partial(parse_json, expected=expected))
        async with self.receive_by(request, make_reader, max_bytes=max_bytes) as value:
            return value

    @contextlib.asynccontextmanager
    async def receive_by(
        self,
        request: Request,
        make_reader: Callable[[], BodyReader[Read]],
        check: Callable[[], None] = lambda: None,
        *,
        max_bytes: int | None = None,
        timeout_s: float | None = None,
        is_held: bool = True,
    ) -> AsyncIterator[Read]:
        """Read a body by a reader, as `receive` does. `is_held`: the reader keeps it in memory."""
        size = held = 0
        max_bytes, timeout_s = max_bytes or self.limits.max_body_bytes, timeout_s or self.limits.body_timeout_s
        chunks = request.stream()
        try:
            check()
            reader = make_reader()
            self._check_headers(request.headers, max_bytes, is_held=is_held)
            async with asyncio.timeout(timeout_s):
                async for chunk in chunks:
                    size += len(chunk)
                    held += len(chunk) if is_held else 0
                    self.held_bytes += len(chunk) if is_held else 0
                    self._check_size(size, max_bytes)
                    reader.feed(chunk)
            # A large body of JSON takes some tenths of a second, in which no other request would be answered.
            read = await asyncio.to_thread(reader.finish) if held > LARGE_BYTES else reader.finish()
        except TimeoutError as exc:
            self.held_bytes -= held
            expected = f"all of it within {timeout_s:g} s"
            raise RequestError("its body comes too slowly", expected, status=408, reason_code="too_slow") from exc
        except BaseException as exc:
            self.held_bytes -= held
            if isinstance(exc, VisionLoopError) and not (size == 0 and "expect" in request.headers):
                await _discard(chunks)
            raise
        try:
            yield read
        finally:
            self.held_bytes -= held

    def _check_headers(self, headers: Mapping[str, str], max_bytes: int, *, is_held: bool) -> None:
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError(
                "its body is compressed", "it as it is", status=415, reason_code="encoding_not_supported"
            )
        length = headers.get("content-length", "0")
        if length.isdecimal():
            self._check_size(int(length), max_bytes, coming=is_held)

    def _check_size(self, size: int, limit: int, *, coming: bool = False) -> None:
        if size > limit:
            raise RequestError(
                f"its body has more than {limit} bytes",
                f"at most {limit}",
                "Send less at once.",
                status=413,
                reason_code="body_too_large",
            )
        if self.held_bytes + (size if coming else 0) > self.limits.max_held_bytes:
            raise RequestError("the server is busy", "a free place", "Try again.", status=503, reason_code="busy")


async def _discard(chunks: AsyncIterator[bytes]) -> None:
    count = 0
    with contextlib.suppress(Exception):
        async with asyncio.timeout(DISCARD_S):
            async for chunk in chunks:
                count += len(chunk)
                if count > DISCARD_BYTES:
                    return


def _make_reader(headers: Mapping[str, str], limits: Limits) -> BodyReader[list[Upload]]:
    kind, options = parse_options_header(headers.get("content-type"))
    if not kind.startswith(b"multipart/"):
        return WholeReader(partial(_read_raw, max_files=limits.max_files))
    if kind != b"multipart/form-data":
        raise make_form_error("has no form in it that can be read")
    if not options.get(b"boundary"):
        raise make_form_error("is a form whose Content-Type names no boundary", NO_BOUNDARY)
    return FormReader(options[b"boundary"], limits.max_files)


class WholeReader(Generic[Read]):
    """Hands the whole body to `read`."""

    def __init__(self, read: Callable[[bytes], Read]) -> None:
        self._read, self._data = read, bytearray()

    def feed(self, chunk: bytes) -> None:
        self._data += chunk

    def finish(self) -> Read:
        return self._read(bytes(self._data))


def parse_json(data: bytes, expected: str) -> object:
    """Raises RequestError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise RequestError("its body is no JSON", expected, reason_code="bad_json") from exc


def _read_raw(data: bytes, max_files: int) -> list[Upload]:
    """Take the whole body as one image, unless it is JSON: no image begins with a brace or a bracket."""
    if not data:
        raise RequestError("its body is empty", "an image", "Send a file or a form.", reason_code="empty")
    if data[:64].lstrip().startswith((b"{", b"[")):
        return _read_images(data, max_files)
    if data.startswith(b"--") and b"form-data" in data[:500].lower():
        raise make_form_error("is a form, but its Content-Type does not say so", NO_BOUNDARY)
    return [Upload(None, data)]


def _read_images(data: bytes, max_files: int) -> list[Upload]:
    if sum(map(data.count, b"[{,")) > MAX_JSON_MARKS:  # a megabyte of `[],` would take twenty in memory
        raise _bad_json("its JSON has very many values")
    value = parse_json(data, IMAGES_FORM)
    if not isinstance(value, dict) or set(value) not in ({"image"}, {"images"}):
        keys = f"the keys {shorten(sorted(value)) or '(none)'}" if isinstance(value, dict) else "no object"
        raise _bad_json(f"its JSON has {keys}"[:200])
    if "image" in value:
        return [Upload(None, read_base64(value["image"], "image"))]
    texts = value["images"]
    if not isinstance(texts, list):
        raise _bad_json("its `images` are no list")
    if not texts:
        raise RequestError("its list of images is empty", "one image at least", reason_code="empty")
    if len(texts) > max_files:
        raise _too_many(f"its JSON has {len(texts)} images", max_files)
    return [Upload(None, read_base64(text, f"images[{i}]"), in_list=True) for i, text in enumerate(texts)]


def read_base64(text: object, name: str) -> bytes:
    """Decode base64, also with the letters of URLs, in lines, without its padding, or as a data URL."""
    if not isinstance(text, str):
        raise _bad_json(f"its `{name}` is no text")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    letters = "".join(text.split()).translate(URL_LETTERS).rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (ValueError, binascii.Error) as exc:
        raise _bad_json(f"its `{name}` is no base64") from exc


class FormReader:
    """Collects the files of a form: every part with a file name, and parts named `file` or `files` without one."""

    def __init__(self, boundary: bytes, max_parts: int) -> None:
        self._max_parts = max_parts
        self._num_parts = 0
        self._whole = False
        self._uploads: list[Upload] = []
        self._header, self._value, self._data = bytearray(), bytearray(), bytearray()
        self._disposition = b""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as exc:
            raise make_form_error("has a boundary that is too long") from exc

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as exc:
            raise make_form_error("is a form that is malformed") from exc

    def finish(self) -> list[Upload]:
        self.require_end()
        if not self._uploads:
            raise RequestError("its form has no file", "a file in the field `file`", reason_code="empty")
        return self._uploads

    def require_end(self) -> None:
        """Raise RequestError for a form that is cut off."""
        if not self._whole:
            raise make_form_error("is a form that is cut off")

    def read_file_name(self, *, has_data: bool = True) -> bytes | None:
        """Return the name of the file that this part is, empty where it has none; None: it is no file."""
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"filename", b"")
        # For an empty file field a browser sends a part without a name and without data.
        return name if name or (has_data and options.get(b"name") in FILE_FIELDS) else None

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._max_parts:
            raise _too_many(f"its form has more than {self._max_parts} parts", self._max_parts)
        self._disposition, self._data = b"", bytearray()

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _on_part_end(self) -> None:
        name = self.read_file_name(has_data=bool(self._data))
        if name is not None:
            self._uploads.append(Upload(_clean_name(name), bytes(self._data)))
        self._data = bytearray()

    def _on_end(self) -> None:
        self._whole = True


def _clean_name(name: bytes) -> str | None:
    text = name.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in text if c.isprintable())[:MAX_NAME_CHARS] or None


def make_form_error(found: str, todo: str = "") -> RequestError:
    return RequestError(f"its body {found}", "multipart/form-data, whole", todo, reason_code="bad_form")


def _bad_json(found: str) -> RequestError:
    return RequestError(found, IMAGES_FORM, "Options such as top_k go into the query.", reason_code="bad_json")


def _too_many(found: str, limit: int) -> RequestError:
    return RequestError(found, f"at most {limit}", "Send several requests.", status=413, reason_code="too_many_files")
