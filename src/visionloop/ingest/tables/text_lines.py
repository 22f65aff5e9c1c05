"""The lines of a text whose encoding may not be said: what it is in, and its lines, within limits.

All of it is looked at once before it is decoded: one line alone may be UTF-8 by chance, or read well in two encodings.
"""

import codecs
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO
from itertools import chain
from typing import BinaryIO, NamedTuple

from visionloop.errors import SourceError
from visionloop.ingest.encodings import MAX_PIECES, choose_example, cut_pieces, guess_encoding, make_encoding_question

MAX_LINE = 16 << 20
BLOCK = 1 << 18
FEW_PIECES = 8  # so few may be UTF-8 by chance
NAMES = {"cp1252": "Windows-1252"}


def settle_encoding(
    stream: BinaryIO, where: str, tell: Callable[[str], None], command: str = "", fallback: str | None = None
) -> str | None:
    """Return the encoding of a text after reading all of it: UTF-8, None if a mark says UTF-16, else guessed and told.

    `command` names the text on the command line; "": nobody can be asked, the most probable one is taken. `fallback` is
    taken where it is not UTF-8.

    Raises:
        SourceError: no encoding fits, lines are in two, or two encodings are about as probable and read differently.
    """
    start = stream.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None
    if start.startswith(codecs.BOM_UTF8):
        return "utf-8"
    good: list[bytes] = []
    bad: list[bytes] = []
    number = first = 0
    is_behind = False
    for block in _read_blocks(start, stream, where):
        if block.isascii() or (len(good) > MAX_PIECES and is_utf8(block)):
            number += block.count(b"\n")
            continue
        for line in BytesIO(block):
            number += 1
            if line.isascii() or (len(good) > MAX_PIECES and is_utf8(line)):
                continue
            if b"\0" in line:
                raise _make_nul_error(where, number)
            if is_utf8(line):
                good.append(line)
            elif len(bad) <= MAX_PIECES:
                bad.append(line)
                if not first:
                    first, is_behind = number, bool(good)
    pieces = cut_pieces(good)
    if not bad and (fallback is None or not pieces) and len(pieces) > FEW_PIECES:
        return "utf-8"
    scan = TextScan(where, pieces, cut_pieces(bad), first, (bad or good)[:MAX_PIECES], is_behind)
    return _choose_encoding(scan, tell, command, fallback)


class TextScan(NamedTuple):
    """The pieces of a text that are beyond ASCII: in lines that can be UTF-8, and in others.

    `first` is the number of the first line that cannot be UTF-8, 0 when all can; `lines` are some to show. `is_behind`:
    others that can be stand before it.
    """

    where: str
    good: list[bytes]
    bad: list[bytes]
    first: int
    lines: list[bytes]
    is_behind: bool = False


def is_utf8(data: bytes) -> bool:
    """Say whether bytes can be UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _choose_encoding(scan: TextScan, tell: Callable[[str], None], command: str, fallback: str | None) -> str:
    as_utf8 = guess_encoding(scan.good)
    is_utf8_text = not scan.good or (as_utf8.best is not None and as_utf8.best.encoding == "utf-8")
    if not scan.bad and (is_utf8_text or not as_utf8.best):
        if as_utf8.is_sure or not (fallback or command):
            return "utf-8"
    elif scan.bad and scan.good and is_utf8_text and as_utf8.is_sure:
        found = f"is not UTF-8, the lines {'before' if scan.is_behind else 'behind'} are"
        raise SourceError(f"{scan.where} line {scan.first}", found, "UTF-8", "Save it as UTF-8.")
    if fallback:
        return fallback
    guess = guess_encoding([*scan.bad, *scan.good][:MAX_PIECES], but=["utf-8"] if scan.bad else [])
    example = choose_example(scan.lines)
    place = f"{scan.where} line {scan.first}" if scan.first else scan.where
    if guess.best is None or guess.best.is_poor:
        if not scan.bad:
            return "utf-8"
        todo = f"Save it as UTF-8, or name the encoding{f': `{command} --encoding NAME`' if command else ''}."
        raise SourceError(place, "is not UTF-8, and reads well in no encoding", "its `encoding`", todo)
    if command and not guess.is_sure:
        raise make_encoding_question(scan.where, "does not say its encoding", guess, example, command)
    best = guess.best.encoding
    shown = " ".join(example.decode(best, "replace").split())[:60]
    others = "; ".join(guess.show(example, first=1))
    tell(
        f"{scan.where}: not UTF-8{f' from line {scan.first} on' if scan.first else ''}, so taken as"
        f" {NAMES.get(best, best)}, as in {shown!r}{f' ({others})' if others else ''};"
        " save it as UTF-8 or name its `encoding` to be sure (--encoding)"
    )
    return best


def _make_nul_error(where: str, number: int) -> SourceError:
    todo = "Save it as UTF-8, or name the source's `encoding`, as utf-16-le."
    return SourceError(f"{where} line {number}", "holds a NUL byte", "text in UTF-8", todo)


def decode_lines(stream: BinaryIO, where: str, tell: Callable[[str], None], encoding: str | None) -> Iterator[str]:
    """Yield lines of text with their ends, in `encoding`. None: UTF-8 as far as it goes, then what the first other line
    is most probably. Raises SourceError.
    """
    start = stream.read(4)
    if encoding not in (None, "utf-8") or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield from _decode_blocks(start, stream, where, encoding)
        return
    start = start.removeprefix(codecs.BOM_UTF8)
    taken, number = "utf-8", 0
    for block in _read_blocks(start, stream, where):
        if taken == "utf-8" and b"\0" not in block and is_utf8(block):
            number += block.count(b"\n")
            yield from StringIO(block.decode(), newline="\n")
            continue
        for line in BytesIO(block):
            number += 1
            try:
                text = line.decode(taken)
            except UnicodeDecodeError as exc:
                if encoding is not None or taken != "utf-8":
                    found = f"is not {taken}, its `encoding`"
                    raise SourceError(f"{where} line {number}", found, "UTF-8", "Save it as UTF-8.") from exc
                taken = _choose_encoding(TextScan(where, [], cut_pieces([line]), number, [line]), tell, "", None)
                text = line.decode(taken)
            if "\0" in text:
                raise _make_nul_error(where, number)
            yield text


def _read_blocks(start: bytes, stream: BinaryIO, where: str) -> Iterator[bytes]:
    """Yield blocks of whole lines, each of at most MAX_LINE bytes; `start` was read before. Raises SourceError."""
    rest = start
    while block := stream.read(BLOCK):
        first, end = block.find(b"\n") + 1, block.rfind(b"\n") + 1
        if len(rest) + (first or len(block)) > MAX_LINE:
            raise SourceError(where, f"has a line of more than {MAX_LINE >> 20} MiB", "one row a line", "Divide it.")
        if end:
            yield rest + block[:end]
            rest = block[end:]
        else:
            rest += block
    if rest:
        yield rest


def _decode_blocks(start: bytes, stream: BinaryIO, where: str, encoding: str | None) -> Iterator[str]:
    """Yield lines in a named encoding, or in the UTF-16 that `start` marks. Raises SourceError."""
    decoder = codecs.getincrementaldecoder(encoding or "utf-16")()
    rest = ""
    try:
        for block in chain([start], iter(lambda: stream.read(1 << 16), b"")):
            *lines, rest = (rest + decoder.decode(block)).removeprefix("\ufeff").split("\n")
            yield from (f"{line}\n" for line in lines)
            if len(rest) > MAX_LINE:
                raise SourceError(
                    where, f"has a line of more than {MAX_LINE >> 20} MiB", "one row a line", "Divide it."
                )
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as exc:
        found = f"is not {encoding}, its `encoding`" if encoding else "is not the UTF-16 that its mark says"
        raise SourceError(where, found, "UTF-8", "Save it as UTF-8.") from exc
    if rest:
        yield rest
