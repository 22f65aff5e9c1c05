"""What a query may be: one SELECT, read without a database. Pure.

This is the second wall, not the first: the first is a session that cannot write (`database.py`). It refuses what a
read-only session still lets pass (files of the server, other servers, locks, sleep), and text that two parsers could
read in two ways.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from visionloop.errors import SourceError

MAX_QUERY_CHARS = 100_000
# Inside a SELECT these write, or take locks. A column of such a name is written in quotes.
WRITING = frozenset({"insert", "update", "delete", "merge", "into", "outfile", "dumpfile", "truncate", "drop", "alter"})
BRACKET_QUOTES = frozenset({"sqlite", "mssql"})

_ACTING = re.compile(
    r"""(?ix)
    load_extension | readfile | writefile | edit | fts3_tokenizer                          # SQLite
    | pg_(read|ls|stat_file|file|sleep|notify|advisory|try_advisory|terminate|cancel|reload|rotate|switch|logical|create
        |drop|replication|promote|export|backup|start|stop|wal|current_logfile|import|stat_reset|prewarm|log)\w*
    | lo_\w+ | loread | lowrite | dblink\w* | set_config | nextval | setval | \w+_to_xml\w*                 # PostgreSQL
    | postgres_fdw\w* | file_fdw\w* | txid_current | pg_current_xact_id
    | load_file | sleep | benchmark | get_lock | release_\w+ | sys_(exec|eval|get|set)\w* | master_pos_wait  # MySQL
    | xp_\w+ | sp_\w+ | openrowset | opendatasource | openquery | waitfor                   # SQL Server
    | utl_\w+ | dbms_\w+ | httpuritype                                                      # Oracle
    | read_\w+ | parquet_scan                                                               # DuckDB
    """
)
_TOKEN = re.compile(
    r"""(?xs)
    (?P<space>\s+)
    | (?P<line>--[^\n]*)
    | (?P<comment>/\*.*?\*/)
    | (?P<text>[eEnNbBxX]?'(?:[^']|'')*')
    | (?P<name>"(?:[^"]|"")*" | `[^`]*`)
    | (?P<dollar>\$(?P<tag>[A-Za-z_]\w*|)\$.*?\$(?P=tag)\$)
    | (?P<word>[^\W\d][\w$]*)
    | (?P<number>\d[\w.]*)
    | (?P<mark>.)
    """
)


class _Token(NamedTuple):
    kind: str
    text: str
    place: int

    def is_mark(self, text: str) -> bool:
        return self.kind == "mark" and self.text == text


def check_statement(query: str, dialect: str, where: str) -> str:
    """Return the query without a last `;`, if it is one SELECT that only computes. Raises SourceError."""
    try:
        return _check(query, dialect)
    except ValueError as exc:
        todo = "Edit the query; a column of such a name is written in quotes."
        raise SourceError(f"{where} query", str(exc), "one SELECT that only reads", todo) from exc


def _check(query: str, dialect: str) -> str:
    if len(query) > MAX_QUERY_CHARS or "\0" in query:
        raise ValueError(f"is longer than {MAX_QUERY_CHARS:,} characters or holds a NUL")
    tokens = [token for token in _read_tokens(query, dialect) if token.kind != "space"]
    while tokens and tokens[-1].is_mark(";"):
        query = query[: tokens.pop().place]
    first = next((token.text.lower() for token in tokens if token.text != "("), "")
    if first not in {"select", "with"}:
        raise ValueError(f"begins with {first[:40]!r}" if first else "is empty")
    _check_parentheses(tokens)
    for token, following in zip(tokens, [*tokens[1:], _Token("end", "", len(query))], strict=True):
        if token.is_mark(";"):
            raise ValueError("holds more than one statement")
        if token.kind == "word" and token.text.lower() in WRITING:
            raise ValueError(f"holds {token.text.upper()}")
        name = token.text.strip('"`[]') if token.kind in {"word", "name"} else ""
        if following.text == "(" and _ACTING.fullmatch(name):
            raise ValueError(f"calls {name}, which does more than compute")
    return query


def _read_tokens(query: str, dialect: str) -> Iterator[_Token]:
    """Yield the tokens. Raises ValueError where databases read the text in different ways."""
    place = 0
    while place < len(query):
        if query[place] == "[" and dialect in BRACKET_QUOTES:
            end = query.find("]", place)
            if end < 0:
                raise ValueError("has a bracket that is not closed")
            yield _Token("name", query[place : end + 1], place)
            place = end + 1
            continue
        match = _TOKEN.match(query, place)
        assert match is not None  # `mark` takes any character
        kind = match.lastgroup or ""
        if match["dollar"] is not None:
            kind = "text" if dialect == "postgresql" else "mark"
        token = _Token(kind, match[0], place)
        _check_token(token, dialect)
        yield token._replace(kind="space") if kind in {"line", "comment"} else token
        place = match.end()


def _check_token(token: _Token, dialect: str) -> None:
    kind, text, _ = token
    if kind == "comment" and ("/*" in text[2:] or text[2:3] in {"!", "+"} or text[2:4] == "M!"):
        raise ValueError("has a comment inside a comment, or one that a database may run")
    if kind == "line" and dialect in {"mysql", "mariadb"} and not text[2:3].isspace() and text != "--":
        raise ValueError("has a comment that is none for MySQL: put a space after --")
    if (kind == "text" and re.search(r"\\['\"]", text)) or (kind == "name" and "\\" in text):
        raise ValueError("has a backslash before a quote or in a name, which databases read in different ways")
    if kind == "mark" and text in {"'", '"', "`"}:
        raise ValueError("has a quote that is not closed")
    if kind == "mark" and (text == "\\" or len(text) > 1 or (text == "#" and dialect in {"mysql", "mariadb"})):
        raise ValueError(f"has {text[:20]!r} outside of quotes")


def _check_parentheses(tokens: list[_Token]) -> None:
    """Raise ValueError unless they are balanced: the query is put into parentheses that it must not leave."""
    depth = 0
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        depth += token.is_mark("(") - token.is_mark(")")
        if depth < 0:
            raise ValueError("closes a parenthesis that it did not open")
        if token.is_mark("/") and following and following.is_mark("*"):
            raise ValueError("has a comment that is not closed")
    if depth:
        raise ValueError("has a parenthesis that is not closed")
