"""From the address of a model to the model: a folder, candidate, NAME@champion, a digest, or one of another store."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from visionloop.bundle import Bundle, download_bundle
from visionloop.data.known_store import check_store
from visionloop.engines import Open, Opened
from visionloop.errors import BundleError, BusyError, PromotionError, SettingsError, shorten
from visionloop.evaluation.runtimes import load_approved
from visionloop.predictor import FP32, Predictor
from visionloop.promotion.ledger import read_champion, require_entry
from visionloop.secrets import mask
from visionloop.settings import Settings
from visionloop.store import ObjectStore, open_store
from visionloop.tracking import DIGEST_TAG
from visionloop.workfolder import is_locked
from visionloop.workspace import Workspace

ADDRESSES = "a bundle's folder, candidate, NAME@champion, NAME@NUMBER, or s3://BUCKET/PREFIX/bundles/DIGEST"
_DIGEST = re.compile(r"[0-9a-f]{12,64}")
_PROMOTED = re.compile(r"([A-Za-z0-9._-]+)@(champion|[0-9]{1,6})")
_STORED = re.compile(r"(.+)/bundles/([0-9a-f]{64})/?")


def load_model(address: str | os.PathLike[str], open_home: Callable[[], Workspace]) -> Predictor:
    """Open the model of an address: digests first, then the golden answers.

    `open_home` opens the workspace whose store a name or digest is looked up in; it is called for these only.

    Raises:
        SettingsError: it is no address.
        PromotionError: the name is not known, or has no champion.
        BundleError: the bundle is missing, incomplete or damaged, or answers differently on this machine.
        StoreError: the store cannot be read.
    """
    if not isinstance(address, str | os.PathLike):
        raise SettingsError("model", f"got {address!r}", ADDRESSES)
    text = os.fspath(address)
    if isinstance(address, str) and "://" in text:
        return _load_stored(text)
    if text == "candidate" and not Path(text).exists():
        return Predictor.load(open_home().settings.candidate_dir)
    folder = Path(text).expanduser()
    if isinstance(address, str) and "@" in text and not folder.is_dir():
        return _load_promoted(text, open_home)
    if _DIGEST.fullmatch(text) and not folder.exists():
        workspace = open_home()
        digest = find_digest(workspace.store, text)
        return Predictor.fetch(workspace.store, digest, workspace.settings.hidden_dir / "bundles")
    if not text or not folder.is_dir():
        found = "is a file" if folder.is_file() and text else "does not exist"
        raise BundleError(f"model {text!r}", found, ADDRESSES, "Check it; a path is relative to the current folder.")
    return Predictor.load(folder)


def load_approved_model(address: str | os.PathLike[str] | None, workspace: Workspace, open_bundle: Open) -> Opened:
    """Open the model of an address (None: the champion) in an engine that is approved for it, by way of `open_bundle`.

    By its card; what stands in a ledger by its entry too. Raises as `load_model`.
    """
    text = f"{workspace.name}@champion" if address is None else os.fspath(address)
    predictor = load_model(text, lambda: workspace)
    bundle = predictor.bundle
    if not bundle.folder.is_dir():
        return Opened(predictor, f"{predictor.engine}: it is not on this machine")
    return open_bundle(bundle, list_approved(predictor, text, workspace))


def list_approved(predictor: Predictor, address: str, workspace: Workspace) -> tuple[str, ...]:
    """Return the engines that may serve the model of an address: by its card; where `evaluate` judged it, by that too.

    What that said stands in the ledger's entry; of the candidate, in the reports of this workspace.
    """
    found = _PROMOTED.fullmatch(address)
    if found and not Path(address).is_dir():
        return require_entry(workspace.store, found[1], None if found[2] == "champion" else int(found[2])).runtimes
    judged = load_approved(workspace.settings.reports_dir, predictor.digest)
    runtimes = predictor.card.runtimes
    return runtimes if judged is None else tuple(one for one in runtimes if one == FP32 or one in judged)


def load_champion(workspace: Workspace, name: str | None = None, number: int | None = None) -> Predictor:
    """Fetch the bundle of the champion, or of another entry of a ledger, check it and load it.

    Raises:
        PromotionError: there is no such entry yet.
        BundleError: its bundle is damaged.
        StoreError: the store cannot be read, or is not the one that the workspace knows.
    """
    check_store(workspace)
    entry = require_entry(workspace.store, name or workspace.name, number)
    return Predictor.fetch(workspace.store, entry.bundle, workspace.settings.hidden_dir / "bundles")


def find_bundle_of_run(workspace: Workspace, run_id: str) -> Path | str:
    """Return where the bundle of an MLflow run is: a folder of this workspace, or its digest if the store has it.

    Raises:
        TrackingError: MLflow has no such run. PromotionError: its bundle is nowhere to be found.
    """
    settings = workspace.settings
    known = next((run for run in workspace.tracking.iterate_runs() if run.run_id == run_id), None)
    if known is None:
        raise PromotionError(f"run {run_id}", "is not in MLflow", "a run of this name", "See `visionloop runs`.")
    digest = known.tags.get(DIGEST_TAG, "")
    for folder in (settings.hidden_dir / "bundles" / digest, settings.candidate_dir):
        if digest and (folder / "digests.json").is_file() and Predictor.load(folder).digest == digest:
            return folder
    if digest and workspace.store.exists(f"bundles/{digest}/digests.json"):
        return digest
    raise PromotionError(
        f"run {run_id}",
        f"its bundle {digest[:12]} is in neither the workspace nor the store" if digest else "has no bundle",
        "a run whose model is kept",
        "Models that were registered are in the store; others stay until the next training: see `dvc exp apply`.",
    )


def fetch_champion(workspace: Workspace) -> Bundle | None:
    """Return the bundle of the champion, fetched into .visionloop/bundles; None: there is none. Raises BundleError."""
    entry = read_champion(workspace.store, workspace.name)
    folder = workspace.settings.hidden_dir / "bundles"
    return download_bundle(workspace.store, entry.bundle, folder) if entry else None


def find_digest(store: ObjectStore, start: str) -> str:
    """Return the digest of the one registered bundle that begins so. Raises BundleError."""
    found = sorted({key.split("/")[1] for key in store.list(f"bundles/{start}")})
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} registered bundles begin so" if found else f"no such bundle is registered in {store.url}"
    raise BundleError(
        f"model {start!r}", what, "the first 12 letters of a digest, or more", "See `visionloop history`."
    )


def _load_stored(url: str) -> Predictor:
    """Load a bundle of a store by way of a temporary folder: nothing of it stays on this machine."""
    found = _STORED.fullmatch(url)
    if not found or not url.startswith(("s3://", "file://")):
        raise SettingsError(f"model {mask(url)!r}", "is not the address of a bundle", ADDRESSES)
    with tempfile.TemporaryDirectory(prefix="visionloop-") as folder:
        return Predictor.fetch(open_store(found[1]), found[2], Path(folder))


def _load_promoted(text: str, open_home: Callable[[], Workspace]) -> Predictor:
    found = _PROMOTED.fullmatch(text)
    if not found:
        raise SettingsError(f"model {text!r}", "is neither a folder nor a name", ADDRESSES)
    workspace, name = open_home(), found[1]
    check_store(workspace)
    require_name(workspace.store, name, f"model {text!r}")
    return load_champion(workspace, name, None if found[2] == "champion" else int(found[2]))


def require_name(store: ObjectStore, name: str, where: str) -> None:
    """Raise PromotionError unless the store has a dataset or a ledger of that name."""
    known = sorted({key.split("/")[1] for folder in ("datasets", "ledger") for key in store.list(f"{folder}/")})
    if name not in known:
        what = f"one of {shorten(known)}" if known else "a name with a dataset"
        todo = "Name another workspace, or set VISIONLOOP_STORE."
        raise PromotionError(where, f"the store {store.url} knows no {name!r}", what, todo)


def load_candidate(workspace: Workspace) -> Predictor:
    """Load models/candidate.

    Raises:
        BusyError: it is missing or half there, and a training is running that will make it.
        BundleError: it is missing or damaged, or answers differently on this machine.
    """
    try:
        return Predictor.load(workspace.settings.candidate_dir)
    except BundleError as exc:
        require_no_training(workspace.settings, exc)
        raise


def require_no_training(settings: Settings, cause: Exception) -> None:
    """Raise BusyError while a training is running in the workspace: what is wrong with models/candidate will pass."""
    if is_locked(settings.work_dir("train")):
        found, todo = "is not there yet: a training is running", "Wait for it; `visionloop runs` shows how far it is."
        raise BusyError("models/candidate", found, "a finished training", todo) from cause
