"""What lies in `.visionloop`: one table of it all, so that forgetting leaves nothing out.

What is in no row is told as unclear, so a new folder cannot be overlooked without a word.
"""

import contextlib
import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

from visionloop.data.prediction_log import drop_forgotten
from visionloop.errors import DatasetError
from visionloop.forget.copies import Copy, count, read_json, remove_all
from visionloop.ingest.video.clip import Spool
from visionloop.settings import Settings
from visionloop.workfolder import DONE, list_work, lock_work

BUNDLES = ("bundles", "bundles-rank*", "serving", "verify-*")  # a folder for each bundle, by its digest
TEMPORARY = ("tmp", "ray")  # what a killed process has left
SEARCHED = (
    *(*BUNDLES, *TEMPORARY, "work", "tensorboard", "failed", "datasets", "features", "ingest", "predict", "store"),
    *("predictions",),
)
TOLD = ("mlflow", "sources", "logs", "prefect")  # told as left, by `run.py`
WITHOUT_IMAGES = (
    *("cache", "dvc", "encoders", "latency", "matplotlib", "runs", "seen", "torch", "tune", "weights"),
    *("curve.png", "dvc.lock", "dvc.lock.staged", "error.json", "lr-find.png", "machine.json", "retrain.lock"),
    "runs.png",
)


def list_bundle_folders(settings: Settings) -> list[Path]:
    """Return the folders of all bundles that were fetched here, also of those that a kill has left half fetched."""
    folders = [path for pattern in BUNDLES for path in settings.hidden_dir.glob(pattern) if path.is_dir()]
    return sorted(path for folder in folders for path in folder.iterdir() if path.is_dir())


def list_unknown(settings: Settings) -> list[str]:
    """Return, in words, what lies here and is in no row of the table."""
    names = sorted(path.name for path in settings.hidden_dir.iterdir()) if settings.hidden_dir.is_dir() else []
    known = (*SEARCHED, *TOLD, *WITHOUT_IMAGES)
    unknown = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in known)]
    return [f".visionloop/{name}, which is not known to hold no images: look there" for name in unknown]


def find_hidden(
    settings: Settings, name: str, sha256s: frozenset[str], versions: Collection[int], *, was_prepared: bool = True
) -> list[Copy]:
    """Return the work of stages, pictures and leftovers that hold an image, or may: all of it can be made again.

    `was_prepared` False: no version ever held one, so no stage has worked on it.
    """
    return [
        *(_find_work(settings) if was_prepared else ()),
        *_find_answers(settings),
        *_find_failed(settings, sha256s),
        *_find_unsent(settings, sha256s),
        *_find_tensorboard(settings, versions),
        *_find_sheets(settings, name),
        *_find_frames(settings),
        *_find_temporary(settings),
    ]


def _find_work(settings: Settings) -> Iterator[Copy]:
    for folder in sorted((settings.hidden_dir / "work").glob("*")):
        if names := list_work(folder):
            kind = "finished" if all((folder / name / DONE).is_file() for name in names) else "unfinished"
            yield Copy(f"{kind} work of {folder.name}", partial(_drop_work, folder))


def _find_answers(settings: Settings) -> Iterator[Copy]:
    """Find what runs of `predict` that were stopped have answered so far: paths of files and their classes."""
    for folder in sorted((settings.hidden_dir / "predict").glob("*")):
        if list_work(folder):
            yield Copy("answers of a predict that was stopped", partial(_drop_work, folder))


def _drop_work(folder: Path) -> None:
    """Take the stage's lock, which drops work for other inputs. Raises BusyError while the stage runs."""
    with lock_work(folder, "forget") as work:
        work.rmdir()


def _find_failed(settings: Settings, sha256s: frozenset[str]) -> Iterator[Copy]:
    """Find the batches that trainings failed on."""
    paths = sorted((settings.hidden_dir / "failed").rglob("batch.json"))
    if doomed := [path.parent for path in paths if _read_batch(path) & sha256s]:
        what = f"{count(len(doomed), 'folder')} with a batch that a training failed on"
        yield Copy(what, partial(remove_all, doomed))


def _find_unsent(settings: Settings, sha256s: frozenset[str]) -> Iterator[Copy]:
    """Find what a server has written down of the images, and the store does not have yet."""
    folder = settings.hidden_dir / "predictions"
    parts = [path for path in sorted(folder.glob("*.parquet")) if _holds_row(path, sha256s)]
    images = [path for path in sorted(folder.glob("*")) if path.name.rpartition("+")[2] in sha256s]
    if parts or images:
        what = f"{count(len(parts) + len(images), 'file')} of the prediction log on the way to the store"
        yield Copy(what, partial(_drop_unsent, parts, images, sha256s))


def _holds_row(path: Path, sha256s: frozenset[str]) -> bool:
    try:
        return drop_forgotten(data := path.read_bytes(), sha256s)[0] is not data
    except FileNotFoundError:
        return False
    except DatasetError:
        return True


def _drop_unsent(parts: Iterable[Path], images: Iterable[Path], sha256s: frozenset[str]) -> None:
    """Write the parts again without the images. A running server may send one meanwhile: it asks for tombstones."""
    remove_all(images)
    for path in parts:
        with contextlib.suppress(FileNotFoundError):
            try:
                data, num_rows = drop_forgotten(path.read_bytes(), sha256s)
            except DatasetError:
                num_rows = 0
            if num_rows:
                staged = path.with_name(f".{path.name}.forgotten")
                staged.write_bytes(data)
                staged.replace(path)
            else:
                path.unlink()


def _read_batch(path: Path) -> frozenset[str]:
    value = read_json(path.read_bytes(), str(path))
    images = value.get("images", []) if isinstance(value, dict) else []
    return frozenset(str(image.get("sha256")) for image in images if isinstance(image, dict))


def _find_tensorboard(settings: Settings, versions: Collection[int]) -> Iterator[Copy]:
    """Find the runs whose name gives a version that held an image, or none: they show a batch of training images."""
    folders = sorted(path for path in (settings.hidden_dir / "tensorboard").glob("*") if path.is_dir())
    named = [(folder, re.search(r"-dataset(\d+)-", folder.name)) for folder in folders]
    if doomed := [folder for folder, match in named if match is None or int(match[1]) in versions]:
        what = f"{count(len(doomed), 'run')} in TensorBoard, which shows training images"
        yield Copy(what, partial(remove_all, doomed))


def _find_sheets(settings: Settings, name: str) -> Iterator[Copy]:
    """Find the contact sheets that `datasets show` has drawn."""
    if paths := sorted((settings.hidden_dir / "datasets").glob(f"{name}-*.png")):
        yield Copy(count(len(paths), "contact sheet"), partial(remove_all, paths))


def _find_frames(settings: Settings) -> Iterator[Copy]:
    """Find the decoded frames of an ingest that was killed; a spool that is opened sweeps them out."""
    folder = settings.hidden_dir / "ingest" / "video" / "spool"
    if folder.is_dir() and any(folder.iterdir()):
        yield Copy("decoded frames of an ingest that was killed", partial(_sweep_frames, folder))


def _sweep_frames(folder: Path) -> None:
    Spool(folder)


def _find_temporary(settings: Settings) -> Iterator[Copy]:
    folders = (settings.hidden_dir / name for name in TEMPORARY)
    if paths := sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir()):
        yield Copy("temporary files of processes that were killed", partial(remove_all, paths))
