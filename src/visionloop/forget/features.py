"""What embeddings keep of images: rows of the table and of features/, pictures and pages drawn from them."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from visionloop.features.table import find_parts, remove_rows
from visionloop.features.view import EMBEDDINGS
from visionloop.forget.copies import Copy, count, read_index, remove_tree
from visionloop.settings import Settings
from visionloop.store import ObjectStore


def find_features(
    settings: Settings, store: ObjectStore, sha256s: frozenset[str], *, shared: frozenset[str]
) -> list[Copy]:
    """Return what holds an embedding or a picture of an image. Rows of the table stay for `shared` ones: other datasets
    of this store have them too."""
    copies = []
    if keys := find_parts(store, sha256s - shared):
        what = f"{count(len(keys), 'part')} of the embedding table in {store.url}, written again without them"
        copies.append(Copy(what, partial(remove_rows, store, keys, sha256s - shared)))
    path = settings.features_dir / EMBEDDINGS
    if path.is_file() and read_index(path.read_bytes(), str(path)) & sha256s:
        copies.append(Copy("features/", partial(remove_tree, settings.features_dir)))
    drawn = [settings.hidden_dir / "features" / "similar.png", settings.hidden_dir / "features" / "map.html"]
    drawn = [path for path in (*drawn, settings.home / "suspects" / "suspects.png") if path.is_file()]
    if drawn:
        copies.append(Copy(count(len(drawn), "picture drawn from embeddings"), partial(_unlink, drawn)))
    corrections = settings.home / "suspects" / "corrections.csv"
    if corrections.is_file() and (kept := _drop_lines(corrections, sha256s)) is not None:
        copies.append(Copy("lines of suspects/corrections.csv", partial(_write, corrections, kept)))
    return copies


def _drop_lines(path: Path, sha256s: frozenset[str]) -> str | None:
    """Return a file without the lines that begin with an image; None where there are none. A person may have edited it:
    the rest stays as it is."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
    kept = [line for line in lines if line[:64].lower() not in sha256s]
    return "".join(kept) if len(kept) < len(lines) else None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogateescape")


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
