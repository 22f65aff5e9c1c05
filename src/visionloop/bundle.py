"""A model bundle on disk: write, read, check its digests, copy it to and from the store. Runs no model.

    model.onnx  weights.safetensors  card.json  reference.npz  golden/*.{png,jpeg,webp}  golden/answers.json
    model.int8.onnx  where the card approves of it: the same network in int8
    digests.json     path -> sha256 of every other file; the bundle's digest is the sha256 of this table

The bundle is a function of its inputs: no time, no path, no run id in it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop import __version__
from visionloop.errors import BundleError, ObjectMissing, shorten
from visionloop.records import CARD_SCHEMA, Card, RunNote, canonical_json, compute_digest
from visionloop.store import ObjectStore
from visionloop.workfolder import is_broken_off, is_locked

DIGESTS = "digests.json"
MODEL, INT8_MODEL = "model.onnx", "model.int8.onnx"
REQUIRED = (MODEL, "card.json", "reference.npz", "golden/answers.json")
CANDIDATE = ("models", "candidate")  # its folder in a workspace
TRAINING_ONLY = frozenset({"weights.safetensors"})
RESTORE = "If it is the champion, `visionloop doctor --fix` puts it back from a copy on this machine."
ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
WITH_DOMAIN = frozenset({"NodeProto", "OperatorSetIdProto", "FunctionProto"})


@dataclass(frozen=True)
class Bundle:
    """A checked bundle in a folder. `digest` names it everywhere."""

    folder: Path
    digest: str
    card: Card
    files: dict[str, str]

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, checked again: a training may have put another bundle into this folder since.

        Raises:
            BundleError: they are not those that were checked.
        """
        try:
            data = (self.folder / name).read_bytes()
        except OSError as exc:
            raise BundleError(f"bundle {self.digest[:12]}", f"{name} cannot be read any more") from exc
        if hashlib.sha256(data).hexdigest() != self.files.get(name):
            raise BundleError(f"bundle {self.digest[:12]}", f"{name} is another one since it was opened")
        return data

    def golden_names(self) -> list[str]:
        """The names of the golden images. Raises BundleError: one is no file beside their answers."""
        names: list[str] = json.loads((self.folder / "golden" / "answers.json").read_text())["images"]
        there = [path.name for path in (self.folder / "golden").iterdir() if path.is_file()]  # `load_bundle` knows all
        if outside := [str(name) for name in names if name not in there]:
            where = f"bundle {self.digest[:12]} golden/answers.json"
            raise BundleError(where, f"names {shorten(outside)}", "files that lie beside it")
        return names

    def golden_images(self) -> list[bytes]:
        """The encoded golden images, in the order of the answers. Raises BundleError."""
        return [(self.folder / "golden" / name).read_bytes() for name in self.golden_names()]

    def golden_logits(self) -> NDArray[np.float64]:
        """The logits (n, k) that the model gave for the golden images when the bundle was made."""
        return np.asarray(json.loads((self.folder / "golden" / "answers.json").read_text())["logits"], dtype=float)


def seal_bundle(folder: Path) -> str:
    """Write `digests.json` over a complete bundle folder and return the bundle's digest."""
    files = {name: hash_file(folder / name) for name in _list_files(folder)}
    (folder / DIGESTS).write_bytes(canonical_json(files))
    return compute_digest(files)


def load_bundle(folder: Path, *, expected_digest: str | None = None) -> Bundle:
    """Open a bundle and check every file against its digest. `weights.safetensors` may be absent.

    Raises:
        BundleError: something is missing, added or changed, or the digest is not the expected one.
    """
    where = f"bundle {folder}"
    todo = "Train again (`visionloop train`), or fetch it again from the store."
    if not (folder / DIGESTS).is_file():
        if folder.parts[-2:] == CANDIDATE and not folder.exists():
            raise BundleError(
                "models/candidate", "there is no candidate", "what a training makes", describe_no_candidate(folder)
            )
        raise BundleError(where, f"no {DIGESTS}", "a model bundle", todo)
    try:
        files: dict[str, str] = json.loads((folder / DIGESTS).read_bytes())
        digest = compute_digest(files)
    except (ValueError, AttributeError) as exc:
        raise BundleError(where, f"{DIGESTS} is damaged", "a table of digests", todo) from exc
    if expected_digest and digest != expected_digest:
        raise BundleError(where, f"has digest {digest[:12]}", expected_digest[:12], todo)
    if missing := [name for name in REQUIRED if name not in files]:
        raise BundleError(where, f"lacks {shorten(missing)}", "a whole bundle", todo)
    present = set(_list_files(folder))
    wrong = {name for name in present if hash_file(folder / name) != files.get(name)}
    wrong |= set(files) - present - TRAINING_ONLY
    if wrong:
        raise BundleError(where, f"{shorten(list(wrong))} differs from its digest", "the files as they were made", todo)
    try:
        value = json.loads((folder / "card.json").read_bytes())
        check_schema(value, where)
        card = Card.from_json(value)
    except BundleError:
        raise
    except (ValueError, TypeError, AttributeError) as exc:
        raise BundleError(where, "card.json is damaged", "a model's card", todo) from exc
    return Bundle(folder=folder, digest=digest, card=card, files=files)


def find_fault(folder: Path) -> str:
    """Return what is wrong with a candidate that is there, and what to do, in a line; nothing if it is whole."""
    try:
        if folder.exists():
            load_bundle(folder)
    except BundleError as exc:
        return f"models/candidate is not as it was made ({exc.found}): `visionloop train` puts it back"
    return ""


def describe_no_candidate(folder: Path) -> str:
    """Say what to do where a workspace has no candidate: its folder of work tells of a training that was broken off."""
    work = folder.absolute().parents[1] / ".visionloop" / "work" / "train"
    if is_broken_off(work):
        return "A training was broken off: `visionloop train` goes on."
    return "A training is under way." if is_locked(work) else "Run `visionloop train`."


def check_schema(card: Mapping[str, Any], where: str) -> None:
    """Refuse a card of a later visionloop: what it adds may change answers, and would be passed over here.

    Raises:
        BundleError: it is newer. ValueError: it says no schema that there could be.
    """
    schema = card.get("schema", 1)
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise ValueError(f"schema {schema!r}")
    if schema > CARD_SCHEMA:
        raise BundleError(
            where,
            f"card.json is of schema {schema}",
            f"at most {CARD_SCHEMA}, which is what visionloop {__version__} knows",
            "It was made by a later visionloop: install that, or train again with this one.",
        )


def check_onnx(model_bytes: bytes, where: str) -> Any:
    """Refuse a model that needs anything outside its file; return it as protobuf has it.

    Raises:
        BundleError: external data, an operator of a custom domain, or no ONNX at all.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(model_bytes)
    except Exception as exc:  # protobuf's DecodeError has no public home
        raise BundleError(where, "is not ONNX", "an ONNX model") from exc
    domains = set()
    for part in _walk(model):
        kind = part.DESCRIPTOR.name
        if kind in WITH_DOMAIN:
            domains.add(part.domain)
        elif kind == "TensorProto" and (part.data_location == onnx.TensorProto.EXTERNAL or part.external_data):
            raise BundleError(where, "keeps weights in other files", "one self-contained file")
    if custom := domains - ALLOWED_DOMAINS:
        raise BundleError(where, f"uses the operator domains {shorten(list(custom))}", "standard ONNX operators")
    return model


def upload_bundle(store: ObjectStore, bundle: Bundle) -> None:
    """Copy a bundle to `bundles/<digest>/`. The table of digests comes last: without it a copy is no bundle."""
    for name in sorted(bundle.files):
        key = f"bundles/{bundle.digest}/{name}"
        if (bundle.folder / name).is_file() and not store.exists(key):
            store.put(key, (bundle.folder / name).read_bytes())
    store.create(f"bundles/{bundle.digest}/{DIGESTS}", (bundle.folder / DIGESTS).read_bytes())


def download_bundle(store: ObjectStore, digest: str, cache_dir: Path, *, with_weights: bool = False) -> Bundle:
    """Fetch `bundles/<digest>/` into `cache_dir/<digest>` (once) and check it.

    Raises:
        BundleError: the store's copy is incomplete or damaged.
    """
    target = cache_dir / digest
    if target.is_dir() and (not with_weights or all((target / n).is_file() for n in TRAINING_ONLY)):
        try:
            return load_bundle(target, expected_digest=digest)
        except BundleError:
            shutil.rmtree(target)
    staged = cache_dir / f".{digest[:16]}-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        _fetch(store, digest, staged, skip=frozenset() if with_weights else TRAINING_ONLY)
        try:
            load_bundle(staged, expected_digest=digest)
        except BundleError as exc:
            raise BundleError(f"bundle {digest[:12]} in {store.url}", exc.found, exc.expected, RESTORE) from exc
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return load_bundle(target, expected_digest=digest)


def _fetch(store: ObjectStore, digest: str, folder: Path, *, skip: frozenset[str]) -> None:
    try:
        table = store.get(f"bundles/{digest}/{DIGESTS}")
        for name in json.loads(table):
            if name in skip:
                continue
            path = (folder / name).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise BundleError(f"bundle {digest[:12]}", f"names the file {name!r}", "files inside the bundle")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(f"bundles/{digest}/{name}"))
        (folder / DIGESTS).write_bytes(table)
    except ObjectMissing as exc:
        raise BundleError(f"bundle {digest[:12]}", f"is not whole in {store.url}", "every file of it", RESTORE) from exc


def hash_file(path: Path) -> str:
    """Return the sha256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_files(folder: Path) -> list[str]:
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != DIGESTS)


def _walk(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all in it, at any depth: inner graphs (of `If`, `Loop`, `Scan`), functions, tensors.

    Whatever field it stands in, so that none is forgotten. What is inside of a tensor is left out.
    """
    yield message
    if message.DESCRIPTOR.name == "TensorProto":
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if hasattr(value, "DESCRIPTOR") else value:
                yield from _walk(inner)


def load_run_note(runs_dir: Path, bundle_digest: str) -> RunNote | None:
    """Read the note of a bundle. None if this workspace did not train it (restored by dvc, or cloned).

    Raises:
        BundleError: the note is damaged.
    """
    path = runs_dir / f"{bundle_digest}.json"
    try:
        return RunNote.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as exc:
        raise BundleError(f"run note {path.name}", "is damaged", "JSON of a run note", f"Delete {path}.") from exc
