"""Names of files and folders that are made from foreign text: labels, and the names that images had. Pure.

Safe on every file system: ASCII letters, digits, `.`, `_`, `-` and space; all else is escaped as `%C3%A9`. No name
leaves its folder, is hidden, or is one that Windows or Hugging Face's `datasets` take for something else.
"""

import hashlib
import re
from collections.abc import Iterable

MAX_FOLDER = 100
MAX_STEM = 60
_KEPT = re.compile(r"[A-Za-z0-9._ -]")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.I)
# Hugging Face takes any folder on the way for a split that has such a word in it, between these separators.
_SPLIT_WORD = re.compile(
    r"(?:^|[-._ 0-9])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?=$|[-._ 0-9])"
)


def make_file_name(sha256: str, origin: str, suffix: str) -> str:
    """Return DIGEST-STEM.SUFFIX: the first 16 digits, and what the file was called where it was first found."""
    stem = re.split(r"[/\\:!]", origin)[-1].rpartition(".")[0] or re.split(r"[/\\:!]", origin)[-1]
    safe = _escape(stem).strip(" .")[:MAX_STEM].rstrip(" .%")
    return f"{sha256[:16]}-{safe}.{suffix}" if safe else f"{sha256[:16]}.{suffix}"


def make_folder_names(labels: Iterable[str]) -> dict[str, str]:
    """Return a folder's name for each label: different labels, different folders, also where case means nothing."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for label in sorted(labels):
        name = make_folder_name(label)
        if name.lower() in taken:
            name = f"{name}-{_digest(label)}"
        taken.add(name.lower())
        names[label] = name
    return names


def make_folder_name(label: str) -> str:
    """Return a label as the name of a folder."""
    name = _escape(label)
    if len(name) > MAX_FOLDER:
        name = f"{name[:MAX_FOLDER].rstrip('%. ')}-{_digest(label)}"
    if not name or name.startswith((".", " ", "__")) or _RESERVED.match(name):
        name = _escape_at(name, 0)
    if name.endswith((".", " ")):
        name = _escape_at(name, len(name) - 1)
    while word := _SPLIT_WORD.search(name):
        name = _escape_at(name, word.start(1))
    return name


def _escape(text: str) -> str:
    return "".join(c if _KEPT.match(c) else _percent(c) for c in text)


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _escape_at(name: str, place: int) -> str:
    return f"{name[:place]}{_percent(name[place : place + 1] or '_')}{name[place + 1 :]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
