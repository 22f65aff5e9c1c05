"""What store and workspace keep of images: bytes, prepared arrays, embeddings, reports. `.visionloop`: see hidden.py.

Each is found first, so that it can be shown, and removed by the function that comes with it.
"""

import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visionloop.data.answers import ANSWERS
from visionloop.data.day_table import DayReader
from visionloop.data.manifest import make_image_key
from visionloop.data.prediction_log import KEPT, find_log_parts, remove_from_log
from visionloop.errors import DatasetError
from visionloop.features.table import find_parts, remove_rows
from visionloop.features.view import EMBEDDINGS, VECTORS
from visionloop.parallel import map_parallel
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.workspace import Workspace

PREDICTIONS = "predictions.csv"
REPORTS = (PREDICTIONS, "figures", "report.html")  # the rest of reports/ is figures about the whole test side


@dataclass(frozen=True)
class Sought:
    """The images to look for, the versions of dataset `name` that hold one, and the champions of all names."""

    name: str
    sha256s: frozenset[str]
    versions: tuple[int, ...]
    champions: frozenset[str]


@dataclass(frozen=True)
class Copy:
    """One thing that holds forgotten images, in words, and how it goes for good. Going twice does no harm."""

    what: str
    remove: Callable[[], None]


def find_stored(store: ObjectStore, sha256s: Iterable[str]) -> list[Copy]:
    """Return the images themselves, with all the versions that the store keeps of them."""
    keys = [make_image_key(sha256) for sha256 in sorted(sha256s)]
    what = f"{count(len(keys), 'image')} in {store.url}, with all earlier versions"
    return [Copy(what, partial(_purge_all, store, keys))] if keys else []


def find_logged(store: ObjectStore, name: str, sha256s: frozenset[str]) -> list[Copy]:
    """Return what the servers of this name wrote down of images: rows of the log, and the images that they kept."""
    copies = []
    if parts := find_log_parts(store, name, sha256s):
        what = f"{count(len(parts), 'part')} of the prediction log in {store.url}, written again without them"
        copies.append(Copy(what, partial(remove_from_log, store, name, parts, sha256s)))
    answers = DayReader(ANSWERS, store, name)
    if parts := answers.find_parts(sha256s):
        what = f"{count(len(parts), 'part')} of the answers of people in {store.url}, written again without them"
        copies.append(Copy(what, partial(answers.remove_rows, parts, sha256s)))
    kept = [key for key in store.list(f"{KEPT}/{name}/") if key.rpartition("/")[2] in sha256s]
    if kept:
        what = f"{count(len(kept), 'image')} that a server kept in {store.url}, with all earlier versions"
        copies.append(Copy(what, partial(_purge_all, store, kept)))
    return copies


def find_prepared(settings: Settings, sha256s: frozenset[str]) -> list[Copy]:
    """Return the prepared arrays if they hold an image."""
    index = settings.prepared_dir / "index.parquet"
    if settings.prepared_dir.is_dir() and (not index.is_file() or holds_any(index, str(index), sha256s)):
        return [Copy("data/prepared", partial(remove_tree, settings.prepared_dir))]
    return []


def find_reports(settings: Settings, sha256s: frozenset[str]) -> list[Copy]:
    """Return reports/ if its test side held an image: pictures of mistakes, the page, one line an image."""
    path = settings.reports_dir / PREDICTIONS
    if not path.is_file() or not read_predictions(path.read_bytes()) & sha256s:
        return []
    return [
        Copy(
            "reports/: page, pictures, predictions",
            partial(remove_all, [settings.reports_dir / name for name in REPORTS]),
        )
    ]


def find_pages(settings: Settings, sha256s: frozenset[str]) -> list[Copy]:
    """Return the pages about decisions and windows that show an image; each names the images that it shows."""
    copies = []
    for folder in (settings.decisions_dir, settings.home / "monitoring"):
        if pages := [path for path in sorted(folder.glob("*.html")) if find_pictured(path.read_bytes()) & sha256s]:
            copies.append(
                Copy(f"{folder.name}/: {count(len(pages), 'page')} with pictures", partial(remove_all, pages))
            )
    return copies


def find_pictured(page: bytes) -> frozenset[str]:
    """Return the sha256 of every image that a page shows."""
    return frozenset(re.findall(r'data-image="([0-9a-f]{64})"', page.decode(errors="replace")))


def find_checkpoints(store: ObjectStore, name: str) -> list[Copy]:
    """Return the unfinished trainings of a dataset that are kept in the store."""
    keys = list(store.list(f"checkpoints/{name}/"))
    what = f"checkpoints of an unfinished training in {store.url}"
    return [Copy(what, partial(_purge_all, store, keys))] if keys else []


def find_windows(store: ObjectStore, name: str, sha256s: frozenset[str]) -> list[Copy]:
    """Return the pages of watched windows that show an image, with the tables of the images that they show."""
    pages = [key for key in store.list(f"monitoring/{name}/") if key.endswith("/report.html")]
    keys = [key for key in pages if find_pictured(store.get(key)) & sha256s]
    tables = [key.replace("/report.html", "/images.parquet") for key in keys]
    what = f"{count(len(keys), 'page')} of watched windows in {store.url}, with the list of their images"
    return [Copy(what, partial(_purge_all, store, keys + tables))] if keys else []


def holds_any(table: Path | bytes, where: str, sha256s: frozenset[str]) -> bool:
    """Say whether the index of prepared data, or embeddings, have a row of an image. Raises DatasetError."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    sought = pa.array(sorted(sha256s), pa.string())
    try:
        file = pq.ParquetFile(pa.BufferReader(table) if isinstance(table, bytes) else table)
        batches = file.iter_batches(columns=["sha256"])
        return any(pc.any(pc.is_in(batch["sha256"], sought)).as_py() for batch in batches)
    except (pa.ArrowInvalid, KeyError, OSError) as exc:
        raise DatasetError(where, "is damaged", "the index of prepared data", "Remove its folder.") from exc


def read_predictions(data: bytes) -> frozenset[str]:
    """Return the sha256 of every row of predictions.csv; none if it is something else."""
    with contextlib.suppress(UnicodeDecodeError, csv.Error):
        return frozenset(row.get("sha256") or "" for row in csv.DictReader(io.StringIO(data.decode())))
    return frozenset()


def read_json(data: bytes, where: str) -> object:
    """Decode JSON. Raises DatasetError."""
    try:
        return json.loads(data)
    except ValueError as exc:
        raise DatasetError(where, "is damaged", "JSON", "Remove it.") from exc


def git(home: Path, *arguments: str) -> str:
    """Return what git says; nothing where there is no repository."""
    done = subprocess.run(["git", *arguments], cwd=home, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout if done.returncode == 0 else ""


def count(number: int, noun: str) -> str:
    """Return `1 image`, `2 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def remove_tree(folder: Path) -> None:
    """Remove a folder by one rename first: half of one would be taken for the whole."""
    doomed = folder.with_name(f".{folder.name}.forgotten")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _purge_all(store: ObjectStore, keys: Sequence[str]) -> None:
    for _ in map_parallel(store.purge, keys):
        pass


def remove_all(paths: Iterable[Path]) -> None:
    """Remove files and folders; one that is gone is no error."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def find_features(workspace: Workspace, sha256s: frozenset[str], *, shared: frozenset[str]) -> list[Copy]:
    """Return what holds an embedding or a picture of an image. Rows of the table stay for `shared` ones: other datasets
    of this store have them too."""
    settings, store = workspace.settings, workspace.store
    copies = []
    if keys := find_parts(store, sha256s - shared):
        what = f"{count(len(keys), 'part')} of the embedding table in {store.url}, written again without them"
        copies.append(Copy(what, partial(remove_rows, store, keys, sha256s - shared)))
    path = settings.features_dir / EMBEDDINGS
    if path.is_file() and holds_any(path, str(path), sha256s):
        copies.append(Copy("features/", partial(remove_tree, settings.features_dir)))
    drawn = sorted((settings.hidden_dir / "features").glob("similar*.png"))
    others = (settings.hidden_dir / "features" / "map.html", settings.home / "suspects" / "suspects.png")
    drawn += [path for path in others if path.is_file()]
    if drawn:
        copies.append(Copy(f"{count(len(drawn), 'picture')} drawn from embeddings", partial(remove_all, drawn)))
    kept_vectors = settings.hidden_dir / "features" / VECTORS
    if kept_vectors.is_file():
        copies.append(Copy("the vectors that `similar` kept", partial(remove_all, [kept_vectors])))
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
