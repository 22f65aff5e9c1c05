"""What dvc keeps of forgotten images: in its cache and on its remotes, also of versions that nobody has checked out.

dvc stores a folder as `files/md5/ab/cdef.dir`, a list of the md5 of its files, which lie beside it. From these lists
the prepared arrays, bundles and reports that hold an image are found; what other folders share with them is kept. Cache
and remotes are read as stores. dvc itself has no command that removes one output: `dvc gc` keeps what any commit names.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from visionloop.bundle import DIGESTS
from visionloop.errors import DatasetError, ObjectMissing, ParamsError, SettingsError, StoreError, VisionLoopError
from visionloop.features.view import EMBEDDINGS
from visionloop.forget.bundles import examine_bundle
from visionloop.forget.copies import PREDICTIONS, REPORTS, Copy, Sought, count, git, holds_any, read_predictions
from visionloop.params.text import parse_yaml
from visionloop.pipeline import make_stage_environment
from visionloop.settings import Settings
from visionloop.store import LocalStore, ObjectStore, open_store

FICLONE = 0x40049409  # linux/fs.h
FILES = "files/md5/"
INDEX = "index.parquet"
OPTIONS_WE_HONOUR = frozenset({"url", "region"})


@dataclass(frozen=True)
class Place:
    """The cache or a remote, as a store; `objects` are the md5 it has (folders end in `.dir`)."""

    what: str
    store: ObjectStore
    objects: frozenset[str]


class _Search:
    """The md5 that hold an image: `data` first to go, then `tables` by which they are found, then `folders`."""

    def __init__(self, sought: Sought, places: Sequence[Place]) -> None:
        self.data: set[str] = set()
        self.tables: set[str] = set()
        self.folders: set[str] = set()
        self.shared: set[str] = set()
        self.unclear: list[str] = []
        self._sought = sought
        self._places = places

    def steps(self) -> list[set[str]]:
        """Return the objects to remove, in the order in which a kill does no harm."""
        return [self.data, self.tables, self.folders]

    def examine_folder(self, md5: str) -> None:
        """Sort the files of one folder: to go, or shared with one that stays."""
        where = f"dvc's folder {md5[:12]}"
        try:
            files = self._read_folder(md5)
            goes, table = self._judge(files, where)
        except (DatasetError, ObjectMissing, KeyError):
            todo = "`dvc gc -w -c` removes what is unused"
            self.unclear.append(f"{where}, whose list of files or of images is missing or damaged: {todo}")
            return
        if not goes:
            self.shared.update(files.values())
            return
        self.folders.add(md5)
        self.tables.add(files[table])
        self.data.update(digest for file, digest in files.items() if file != table)

    def examine_reports(self, outs: Mapping[str, str]) -> None:
        """If a report's test side held an image, its pictures, its page and its lines go."""
        figures = outs.get("figures", "")
        try:
            goes = bool(read_predictions(self._read(outs[PREDICTIONS])) & self._sought.sha256s)
            pictures = set(self._read_folder(figures).values()) if figures else set()
        except (ObjectMissing, DatasetError):
            return  # never kept, or gone already
        files = {md5 for name, md5 in outs.items() if name not in {PREDICTIONS, "figures"}}
        if not goes:
            self.shared |= pictures | files
            return
        self.tables.add(outs[PREDICTIONS])
        self.folders |= {figures} if figures else set()
        self.data |= pictures | files

    def _judge(self, files: Mapping[str, str], where: str) -> tuple[bool, str]:
        """Say whether a folder goes, and by which of its files that is known. Raises DatasetError, ObjectMissing."""
        if INDEX in files:
            return holds_any(self._read(files[INDEX]), where, self._sought.sha256s), INDEX
        if EMBEDDINGS in files:
            return holds_any(self._read(files[EMBEDDINGS]), where, self._sought.sha256s), EMBEDDINGS
        if DIGESTS in files:
            self._read(files[DIGESTS])
            held = examine_bundle(lambda file: self._read(files[file]), self._sought, where)
            return held is not None and held.digest not in self._sought.champions, DIGESTS
        return False, ""

    def _read_folder(self, md5: str) -> dict[str, str]:
        """Return the files of a folder, name -> md5. Raises ObjectMissing, DatasetError."""
        try:
            return {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(self._read(md5))}
        except (ValueError, TypeError, KeyError) as exc:
            raise DatasetError(f"dvc object {md5}", "is damaged", "a list of files") from exc

    def _read(self, md5: str) -> bytes:
        """Return an object from the first place that has it. Raises ObjectMissing."""
        for place in self._places:
            if md5 in place.objects:
                with contextlib.suppress(ObjectMissing):
                    return place.store.get(_key(md5))
        raise ObjectMissing(f"dvc object {md5}", "is nowhere", "it in the cache or on a remote")


def find_dvc_copies(settings: Settings, sought: Sought) -> tuple[list[Copy], list[str]]:
    """Return what goes from dvc's cache and remotes, and in words what could not be looked at."""
    places, closed = open_places(settings.home, os.environ)
    search = _Search(sought, places)
    search.unclear += closed
    for outs in _list_reports(settings, places):
        search.examine_reports(outs)
    folders = {md5 for place in places for md5 in place.objects if md5.endswith(".dir")}
    for md5 in sorted(folders - search.folders):
        search.examine_folder(md5)
    copies = []
    for place in places:
        steps = [sorted((group - search.shared) & place.objects) for group in search.steps()]
        if number := sum(len(step) for step in steps):
            copies.append(Copy(f"{count(number, 'object')} in {place.what}", partial(_purge, place.store, steps)))
    return copies, search.unclear


def open_places(home: Path, env: Mapping[str, str]) -> tuple[list[Place], list[str]]:
    """Open dvc's cache and its remotes; return also, in words, what cannot be opened."""
    if not (home / ".dvc").is_dir():
        return [], []
    config = _read_config(home)
    if config is None:
        return [], ["dvc's cache and remotes: `dvc config --list` failed; run `visionloop forget` again with dvc there"]
    cache = Path(config.get("cache.dir") or home / ".dvc" / "cache")
    wanted = [("dvc's cache", cache.as_uri(), {"url"})]
    for name in sorted({key.split(".")[1] for key in config if key.startswith("remote.") and key.endswith(".url")}):
        options = {key.split(".", 2)[2] for key in config if key.startswith(f"remote.{name}.")}
        if config.get(f"remote.{name}.endpointurl") == env.get("AWS_ENDPOINT_URL"):
            options.discard("endpointurl")
        wanted.append((f"dvc's remote {name}", config[f"remote.{name}.url"], options))
    places, closed = [], []
    for what, url, options in wanted:
        try:
            places.append(_open(what, url, options))
        except (SettingsError, StoreError) as exc:
            closed.append(f"{what}, which could not be looked at ({exc.found}): `dvc gc -w -c` removes what is unused")
    return places, closed


def _open(what: str, url: str, options: Collection[str]) -> Place:
    if "://" not in url:
        url = Path(url).as_uri()
    if not url.startswith(("file://", "s3://")) or set(options) - OPTIONS_WE_HONOUR:
        raise SettingsError(what, "its address or its options are not known to us", "a folder or a bucket")
    store = open_store(url)
    keys = (key.removeprefix(FILES).replace("/", "") for key in store.list(FILES))
    return Place(what, store, frozenset(key for key in keys if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", key)))


def _read_config(home: Path) -> dict[str, str] | None:
    """Return dvc's configuration of all levels, its paths absolute; None where dvc cannot tell."""
    env = make_stage_environment(home, os.environ)
    command = [sys.executable, "-m", "dvc", "config", "--list"]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    lines = (line.partition("=") for line in done.stdout.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in lines}


def is_copied(home: Path) -> bool:
    """Say whether dvc keeps a second copy of what a stage makes on the same disk: its cache has no links there."""
    config = _read_config(home) or {}
    kinds = config.get("cache.type", "reflink,copy")
    cache = Path(config.get("cache.dir") or home / ".dvc")
    if "link" in kinds.replace("reflink", "") or not cache.exists() or cache.stat().st_dev != home.stat().st_dev:
        return False
    return not ("reflink" in kinds and _has_reflinks(home))


def _has_reflinks(folder: Path) -> bool:
    """Say whether two files of this disk can share their bytes (btrfs, XFS)."""
    with tempfile.TemporaryFile(dir=folder) as one, tempfile.TemporaryFile(dir=folder) as other:
        one.write(b"1")
        one.flush()
        try:
            fcntl.ioctl(other.fileno(), FICLONE, one.fileno())
        except OSError:
            return False
    return True


def _list_reports(settings: Settings, places: Iterable[Place]) -> Iterator[dict[str, str]]:
    """Yield the outputs of every known run of `evaluate`, name -> md5: of dvc.lock, also in git, and the run cache."""
    commits = git(settings.home, "log", "--all", "--format=%H", "--", "dvc.lock").split()
    texts = [git(settings.home, "show", f"{commit}:./dvc.lock") for commit in commits]
    with contextlib.suppress(OSError):
        texts.append((settings.home / "dvc.lock").read_text(encoding="utf-8"))
    for place in places:
        if isinstance(place.store, LocalStore):
            with contextlib.suppress(VisionLoopError):
                texts += [place.store.get(key).decode(errors="replace") for key in place.store.list("runs/")]
    for text in texts:
        for stage in _list_stages(text):
            outs = stage.get("outs") or ()
            known = {str(out["path"]).rpartition("/")[2]: str(out["md5"]) for out in outs if "md5" in out}
            if PREDICTIONS in known:
                yield {name: md5 for name, md5 in known.items() if name in REPORTS}


def _list_stages(text: str) -> list[dict[str, Any]]:
    """Return the stages of a dvc.lock, or the one of an entry of the run cache."""
    try:
        value = parse_yaml(text)
    except ParamsError:
        return []
    if not isinstance(value, dict):
        return []
    stages = value.get("stages", {"": value})
    return [stage for stage in stages.values() if isinstance(stage, dict)] if isinstance(stages, dict) else []


def _purge(store: ObjectStore, steps: Iterable[Iterable[str]]) -> None:
    for step in steps:
        for md5 in step:
            store.purge(_key(md5))


def _key(md5: str) -> str:
    return f"{FILES}{md5[:2]}/{md5[2:]}"
