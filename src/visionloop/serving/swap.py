"""The model that answers now, and the thread that follows the ledger to the next one.

A new bundle is downloaded, checked and loaded while the current model serves. One assignment then replaces it. If
anything fails, the current model stays. The last two bundles stay on disk: a server that starts while the store is away
serves the one that was served last. Knows nothing of HTTP.
"""

import contextlib
import ctypes
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visionloop.bundle import Bundle, download_bundle, load_bundle
from visionloop.engines import Open, list_candidates, open_plainly
from visionloop.errors import ServingError, StoreError, VisionLoopError
from visionloop.predictor import FP32, Predictor
from visionloop.records import LedgerEntry
from visionloop.store import ObjectStore
from visionloop.workfolder import write_file

STOP_S = 5.0
LAST = "last.json"  # beside the bundles: which were served last, and for which ledger entry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """A loaded model. What the ledger says of it is None for a bundle that is served from a path.

    `entry` is the number in the ledger, `promoted_at` the time of that, ISO 8601, `approved` the engines that it
    approves. `why` says which engine answers, and how fast it and the others are here; `decoders` how many threads had
    better decode beside it (0: as ever).
    """

    predictor: Predictor
    version: str | None = None
    entry: int | None = None
    promoted_at: str | None = None
    approved: tuple[str, ...] = ()
    why: str = FP32
    decoders: int = 0

    @property
    def name(self) -> str:
        return self.predictor.card.name

    @property
    def digest(self) -> str:
        return self.predictor.digest


def _may_go_on(current: ServedModel, entry: LedgerEntry) -> bool:
    """Say whether the engines of this machine that an entry approves are those that the model was chosen among."""
    bundle = current.predictor.bundle
    return list_candidates(bundle, entry.runtimes) == list_candidates(bundle, current.approved)


def give_memory_back() -> None:
    """Hand the memory of the model before back to the system; glibc keeps it: 300 MB after some swaps of ResNet18."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)


class ModelSlot:
    """Holds the current model. `problem` says why a newer one is not served; it holds no path.

    `is_leaving`: the server stops soon, and wants no new clients. `looked_at`: when the ledger was read last, in
    seconds since 1970; None: it was not.
    """

    def __init__(self, current: ServedModel | None = None) -> None:
        self.current = current
        self.problem: str | None = None
        self.is_leaving = False
        self.num_swaps = 0
        self.num_failures = 0
        self.num_refused = 0
        self.looked_at: float | None = None


class ChampionFollower:
    """Keeps the champion that `find_champion` returns in a slot. A refused bundle is tried again after `retry_s`."""

    def __init__(
        self,
        slot: ModelSlot,
        *,
        name: str,
        find_champion: Callable[[], LedgerEntry | None],
        store: ObjectStore,
        cache_dir: Path,
        poll_s: float,
        retry_s: float = 60.0,
        check: Callable[[], None] = lambda: None,
        open_model: Open = open_plainly,
    ) -> None:
        """`check` raises StoreError for a store that is not the known one; it is asked until it has passed once.

        `open_model` opens a checked bundle, in an engine that its ledger entry approves.
        """
        self.slot, self._name = slot, name
        self._check, self._is_checked = check, False
        self._open_model = open_model
        self._find_champion = find_champion
        self._store = store
        self._cache_dir = cache_dir
        self._poll_s, self._retry_s = poll_s, retry_s
        self._refused: tuple[int, float] | None = None
        self._stopping = threading.Event()
        self._looking = threading.Lock()
        self._thread: threading.Thread | None = None
        self.after_look: Callable[[], None] = lambda: None  # must not raise

    def load_first(self) -> None:
        """Load the champion; if the store is away, the model that was served last. Else fail, and say why.

        Raises:
            ServingError: the ledger has no champion.
            VisionLoopError: the store cannot be read and no model was served before, or the bundle is refused.
        """
        try:
            self._check_once()
            entry = self._require_champion()
            self.slot.current = self._load(entry)
            self._remember(entry)
        except StoreError as exc:
            self.slot.current = self._load_last(exc)
            self._note_problem(None, exc, time.monotonic())
            log.warning("started with the model that was served last: ledger entry %s", self.slot.current.entry)

    def start(self) -> None:
        """Poll the ledger in a background thread until `stop`."""
        self._thread = threading.Thread(target=self._follow, name="follow-ledger", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. If it hangs in a store that does not answer, it ends with the process."""
        self._stopping.set()
        if self._thread:
            self._thread.join(STOP_S)

    def look_now(self) -> None:
        """Look at the ledger now, also for a bundle that was refused a moment ago. May be called by any thread."""
        with self._looking:
            self._refused = None
            self.poll_once(time.monotonic())

    def poll_once(self, now_s: float) -> None:
        """Look at the ledger once and swap if it names another model. Never raises: problems go to the slot."""
        number: int | None = None
        try:
            self._check_once()
            entry = self._require_champion()
            if self._is_current(entry):
                self._clear_problem()
                return
            number = entry.number
            if self._refused and self._refused[0] == number and now_s < self._refused[1]:
                return
            self._swap(entry)
        except Exception as exc:  # no error of a store or a bundle may end the thread
            self._note_problem(number, exc, now_s)

    def _follow(self) -> None:
        while not self._stopping.wait(self._poll_s):
            with self._looking:
                self.poll_once(time.monotonic())
            self.after_look()

    def _check_once(self) -> None:
        if not self._is_checked:
            self._check()
            self._is_checked = True

    def _require_champion(self) -> LedgerEntry:
        entry = self._find_champion()
        self.slot.looked_at = time.time()
        if entry is None:
            raise ServingError(
                "ledger",
                "has no champion",
                "a promoted model",
                "Run `visionloop start`, or pass --bundle models/candidate.",
            )
        return entry

    def _is_current(self, entry: LedgerEntry) -> bool:
        current = self.slot.current
        return current is not None and (current.entry, current.digest) == (entry.number, entry.bundle)

    def _swap(self, entry: LedgerEntry) -> None:
        current = self.slot.current
        if current and current.digest == entry.bundle and _may_go_on(current, entry):
            self.slot.current = replace(
                current,
                version=entry.model_version,
                entry=entry.number,
                promoted_at=entry.at,
                approved=tuple(entry.runtimes),
            )
        else:
            self.slot.current = self._load(entry)
            current = None
            give_memory_back()
        self._remember(entry)
        self.slot.num_swaps += 1
        self._clear_problem()
        log.info("serving entry %d, version %s, bundle %s", entry.number, entry.model_version, entry.bundle[:12])

    def _load(self, entry: LedgerEntry) -> ServedModel:
        bundle = download_bundle(self._store, entry.bundle, self._cache_dir)
        return self._open(bundle, entry.runtimes, entry.model_version, entry.number, entry.at)

    def _open(
        self, bundle: Bundle, approved: Sequence[str], version: str, number: int, promoted_at: str | None
    ) -> ServedModel:
        opened = self._open_model(bundle, approved)
        return ServedModel(opened.predictor, version, number, promoted_at, tuple(approved), opened.why, opened.decoders)

    def _load_last(self, why: StoreError) -> ServedModel:
        """Load what was served last, its bytes checked again. Raises `why` if there is nothing whole."""
        try:
            last = json.loads((self._cache_dir / LAST).read_bytes())
            if last["name"] != self._name:
                raise ValueError(f"the last one was of {last['name']}")
            folder = self._cache_dir / str(last["bundles"][0])
            bundle = load_bundle(folder, expected_digest=folder.name)
            approved = [str(name) for name in last.get("runtimes", [])]
            return self._open(bundle, approved, last["version"], int(last["entry"]), last.get("at"))
        except (OSError, ValueError, KeyError, TypeError, IndexError, VisionLoopError) as exc:
            log.info("no model was served before: %s", exc)
            raise why from exc

    def _remember(self, entry: LedgerEntry) -> None:
        """Write down what is served now, and keep its bundle and the one before. A full disk is no reason to stop."""
        path = self._cache_dir / LAST
        try:
            before = json.loads(path.read_bytes())["bundles"] if path.exists() else []
            bundles = [entry.bundle, *(one for one in before if one != entry.bundle)][:2]
        except (OSError, ValueError, KeyError, TypeError):
            bundles = [entry.bundle]
        try:
            last = {"name": self._name, "entry": entry.number, "version": entry.model_version, "at": entry.at}
            last |= {"bundles": bundles, "runtimes": list(entry.runtimes)}
            write_file(path, json.dumps(last).encode())
            for folder in self._cache_dir.iterdir():
                if folder.is_dir() and not folder.name.startswith(".") and folder.name not in bundles:
                    shutil.rmtree(folder)
        except OSError as exc:
            log.warning("what is served now could not be written down: %s", exc)

    def _clear_problem(self) -> None:
        if self.slot.problem:
            log.info("solved: %s", self.slot.problem)
        self.slot.problem, self._refused = None, None

    def _note_problem(self, number: int | None, exc: Exception, now_s: float) -> None:
        self.slot.num_failures += 1
        if number is not None and not isinstance(exc, StoreError):
            self._refused = (number, now_s + self._retry_s)
            self.slot.num_refused += 1
        # Only `found`, without the store's address: this text is shown to clients, and `where` may be a path.
        found = exc.found if isinstance(exc, VisionLoopError) else type(exc).__name__
        found = found.replace(self._store.url, "the store")
        what = "the ledger cannot be read" if number is None else f"ledger entry {number} is not served"
        kind = exc.code if isinstance(exc, VisionLoopError) else "internal"
        problem = f"{what}: {kind}: {found}"
        if problem != self.slot.problem:
            self.slot.problem = problem
            expected = isinstance(exc, VisionLoopError)
            log.error("%s; the current model goes on: %s", what, exc, exc_info=None if expected else exc)
