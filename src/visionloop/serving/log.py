"""Writes down what the server answers, off the path of a request: it never waits, and drops what it cannot take.

An answer is noted in memory. One thread makes rows of what was noted and writes them as a part into a folder on the
local disk, the spool; another one sends the parts, and the images that were kept, from there to the store. While the
store is away the spool grows, up to a limit. A part that a killed server left there is sent by the next one; rows that
were not in a part yet are lost.

.visionloop/predictions/    what is to be sent: a file for each object, named after its key with + for /
"""

import contextlib
import heapq
import logging
import random
import secrets
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np

from visionloop.data.day_table import DayTable
from visionloop.data.images import UInt8Array
from visionloop.data.manifest import make_image_key
from visionloop.data.prediction_log import (
    PREDICTIONS,
    REQUESTS,
    drop_forgotten,
    expire_log,
    make_kept_key,
    round_embedding,
)
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import DatasetError, StoreError, VisionLoopError
from visionloop.evaluation.slices import measure_images
from visionloop.params import Serve
from visionloop.predictor import FloatArray
from visionloop.serving.answers import Answer
from visionloop.serving.keep import Choice, Keeper
from visionloop.serving.swap import ServedModel
from visionloop.store import ObjectStore
from visionloop.store.keys import is_key

MAX_NOTED, MAX_NOTED_BYTES = 4096, 64_000_000  # answers that wait for a row, and the bytes of their images
MAX_ROWS = 5_000  # of a part: about 30 MB in memory with 1,280 numbers each
MAX_SPOOL_BYTES = 256_000_000
COUNTED_S = 300.0  # between two rows of counts
MEASURED_PER_S = 32  # images of which brightness, contrast and sharpness are taken: the cost is bounded
DRAIN_S, RETRY_S, MAX_RETRY_S, STOP_S = 0.05, 1.0, 60.0, 5.0
WARM_S = 2.0  # after the start: then the server is ready, and has its cores for itself
OLD_S = 600.0  # nobody takes so long to write a file
SPOOL = "predictions"  # in the hidden folder of the workspace
SLASH = "+"  # no key has it
SUFFIX = ".writing"
KEPT_NOTHING = Choice(False, 0.0, None)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Noted:
    """One answered image, as it is noted: what costs time is found out later."""

    request_id: str
    at_s: float
    model: ServedModel
    data: bytes
    answer: Answer
    total_ms: float
    client_request_id: str | None = None
    client: str | None = None


class PredictionLog:
    """The log of one server. `note` and `measure` may be called from any thread, at any time.

    `num_noted` answers, of which `num_dropped` were not written down; `num_sent` rows are in the store, and `num_kept`
    images. `num_spool_bytes` wait for the store.
    """

    def __init__(
        self,
        name: str,
        store: ObjectStore,
        spool: Path,
        serve: Serve,
        *,
        check: Callable[[], None] = lambda: None,
        draw: random.Random | None = None,
    ) -> None:
        """`check` raises StoreError for a store that is not the known one: it is asked before each sending."""
        self._name, self._store, self._spool, self._serve = name, store, spool, serve
        self._check = check
        self._draw = draw or random.Random(secrets.randbits(128))
        rules = serve.keep_images
        self.keeper = None if rules == "none" else Keeper(rules, now_s=time.monotonic(), draw=self._draw)
        self._server, self._num_parts = secrets.token_hex(4), 0
        self._noted: deque[Noted] = deque()
        self._noted_bytes = 0
        self._rows: list[dict[str, Any]] = []
        self._first_row_s = self._measured_s = 0.0
        self._counts, self._counted_s = Counter[str](), time.monotonic()
        self._forgotten: frozenset[str] = frozenset()
        self._expired_on = date.min
        self._lock = threading.Lock()
        self._stopping, self._written = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("log-write", self._write_on), ("log-send", self._send_on))
        ]
        self.num_noted = self.num_dropped = self.num_sent = self.num_kept = self.num_spool_bytes = 0
        self._problems: dict[str, str] = {}

    @property
    def problem(self) -> str | None:
        """What is wrong, without paths and addresses: clients may see it."""
        return "; ".join(self._problems.copy().values()) or None

    def start(self) -> None:
        """Begin to write and to send. Half-written files of a server that was killed are removed."""
        self.num_spool_bytes = sum(_measure_spool(self._spool).values())  # also where nothing can be sent yet
        for path in self._spool.glob(f".*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > OLD_S:
                    path.unlink()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Write down all that was noted, send what can be sent in STOP_S, and end."""
        self._stopping.set()
        self._written.set()
        stop_at_s = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, stop_at_s - time.monotonic()))

    def note(self, noted: Noted) -> None:
        """Note an answer; it is dropped and counted if too many wait for their rows. Takes some microseconds."""
        with self._lock:
            self.num_noted += 1
            if len(self._noted) >= MAX_NOTED or self._noted_bytes > MAX_NOTED_BYTES:
                self.num_dropped += 1
            else:
                self._noted.append(noted)
                self._noted_bytes += len(noted.data)

    def count(self, status: int) -> None:
        """Count a request for an answer by its HTTP status; 0: the client went away before there was one."""
        with self._lock:
            self._counts["requests"] += 1
            if status in (429, 503):
                self._counts["refused"] += 1
            elif status >= 500:
                self._counts["errors"] += 1

    def measure(self, image_hwc: UInt8Array) -> dict[str, float] | None:
        """Return brightness, contrast and sharpness of a decoded image; None if enough were measured just now."""
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._measured_s < 1 / MEASURED_PER_S:
                return None
            self._measured_s = now_s
        return {name: float(value_n[0]) for name, value_n in measure_images(image_hwc[None]).items()}

    def _write_on(self) -> None:
        warm_at_s: float | None = time.monotonic() + WARM_S
        while True:
            is_last = self._stopping.wait(DRAIN_S)
            self._drain(is_last)
            if warm_at_s is not None and time.monotonic() > warm_at_s:
                PREDICTIONS.make_schema()  # loads pyarrow, for which the first feedback would wait
                warm_at_s = None
            if is_last:
                return

    def _drain(self, is_last: bool) -> None:
        """Make rows of what was noted; write a part if it is time."""
        with self._lock:
            noted, self._noted, self._noted_bytes = list(self._noted), deque(), 0
        by_model: dict[int, list[Noted]] = defaultdict(list)
        for one in noted:
            by_model[id(one.model)].append(one)
        for group in by_model.values():
            try:
                self._add_rows(group)
            except Exception as exc:
                self._drop(exc, len(group))
        waited_s = time.monotonic() - self._first_row_s
        if self._rows and (is_last or len(self._rows) >= MAX_ROWS or waited_s >= self._serve.log_flush_s):
            self._write_parts()
        if self._counts and (is_last or time.monotonic() - self._counted_s >= COUNTED_S):
            self._write_counts()

    def _write_counts(self) -> None:
        """Write down how many requests there were since the last time, also where none was answered."""
        with self._lock:
            counts, self._counts, self._counted_s = self._counts, Counter[str](), time.monotonic()
        row = {"time": datetime.now(UTC), "server": self._server, "refused": 0, "errors": 0, **counts}
        self._write_part(REQUESTS, [row])

    def _add_rows(self, group: Sequence[Noted]) -> None:
        choices = [KEPT_NOTHING] * len(group)
        embedding_nd = np.stack([one.answer.embedding_d for one in group])
        if self.keeper:
            confidences = [one.answer.confidence for one in group]
            choices = self.keeper.choose(group[0].model.predictor, confidences, embedding_nd, time.monotonic())
        if not self._rows:
            self._first_row_s = time.monotonic()
        # All are rounded at once: for one alone NumPy takes longer to begin than to work.
        for one, choice, embedding_d in zip(group, choices, round_embedding(embedding_nd), strict=True):
            with_embedding = self._draw.random() < self._serve.log_embeddings
            row = make_row(one, self._serve.log_top_k, embedding_d if with_embedding else None)
            is_lost = choice.is_kept and not self._keep(one)
            row["image_kept"] = choice.is_kept and not is_lost
            row["keep_probability"] = None if is_lost else choice.probability
            row["keep_reason"] = choice.reason
            self._rows.append(row)

    def _keep(self, one: Noted) -> bool:
        """Put an image into the spool; say whether it is there."""
        sha256 = one.answer.sha256
        key = make_kept_key(self._name, datetime.fromtimestamp(one.at_s, UTC).date(), sha256)
        is_kept = sha256 not in self._forgotten and self._put_aside(key, one.data)
        self.num_kept += is_kept
        return is_kept

    def _write_parts(self) -> None:
        """Write all rows, those of each day as a part."""
        days: dict[date, list[dict[str, Any]]] = defaultdict(list)
        for row in self._rows:
            days[row["time"].date()].append(row)
        self._rows = []
        for rows in days.values():
            self._write_part(PREDICTIONS, rows)

    def _write_part(self, table: DayTable, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows of one day into the spool as a part."""
        time, num_answers = rows[0]["time"], len(rows) if table is PREDICTIONS else 0
        self._num_parts += 1
        key = table.make_key(self._name, time.date(), f"{time:%H%M%S}-{self._server}-{self._num_parts:06d}")
        try:
            if self._put_aside(key, table.encode(rows)):
                self._solve("write")
            else:
                self.num_dropped += num_answers
        except Exception as exc:
            self._drop(exc, num_answers)
        self._written.set()

    def _put_aside(self, key: str, data: bytes) -> bool:
        """Write a file into the spool; say whether there was room."""
        path = self._spool / key.replace("/", SLASH)
        if path.exists():
            return True
        if self.num_spool_bytes + len(data) > MAX_SPOOL_BYTES:
            self._tell("write", "the spool is full: answers are dropped")
            return False
        self._spool.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}{SUFFIX}")
        staged.write_bytes(data)
        staged.replace(path)
        with self._lock:
            self.num_spool_bytes += len(data)
        return True

    def _drop(self, exc: Exception, number: int) -> None:
        """Count answers that are lost, and go on: neither a full disk nor a bug of ours may end the thread."""
        self.num_dropped += number
        found = exc.strerror if isinstance(exc, OSError) else None
        self._tell("write", f"answers are not written down: {found or type(exc).__name__}", None if found else exc)

    def _send_on(self) -> None:
        retry_s = RETRY_S
        while True:
            is_last = self._stopping.is_set()
            if is_last:
                self._threads[0].join(STOP_S)
            try:
                self._check()
                self._look_after()
                self._send_all()
                self._solve("send")
                retry_s = RETRY_S
            except Exception as exc:
                found = exc.found if isinstance(exc, VisionLoopError) else type(exc).__name__
                problem = f"the store cannot be written: {found.replace(self._store.url, 'the store')}"
                self._tell("send", problem, None if isinstance(exc, StoreError) else exc)
                if not is_last and not self._stopping.wait(retry_s):
                    retry_s = min(2 * retry_s, MAX_RETRY_S)
                    continue
            if is_last:
                return
            self._written.wait()
            if not self._stopping.is_set():
                self._written.clear()

    def _send_all(self) -> None:
        """Send what is in the spool, images first: a row never names an image that is not there."""
        sizes = _measure_spool(self._spool)
        self._forgotten = load_tombstones(self._store, self._name)  # each time: what is forgotten is not written after
        with self._lock:
            self.num_spool_bytes = sum(sizes.values())
        for path, size in sizes.items():
            with contextlib.suppress(FileNotFoundError):  # another server of this workspace was faster
                self._send(path)
                path.unlink()
            with self._lock:
                self.num_spool_bytes -= size

    def _send(self, path: Path) -> None:
        key, data = path.name.replace(SLASH, "/"), path.read_bytes()
        if key.startswith(f"{REQUESTS.kind}/"):
            self._store.create(key, data)
            return
        if not key.startswith(f"{PREDICTIONS.kind}/"):
            sha256 = key.rpartition("/")[2]
            if sha256 not in self._forgotten and not any(map(self._store.exists, (key, make_image_key(sha256)))):
                self._store.put(key, data)
            return
        try:
            data, num_rows = drop_forgotten(data, self._forgotten)
        except DatasetError as exc:  # cut off by a full disk, or somebody else's file: it would come again for ever
            log.error("prediction log: a part in the spool is removed: it %s", exc.found)
            return
        if num_rows:
            self._store.create(key, data)
            self.num_sent += num_rows

    def _look_after(self) -> None:
        """Once a day remove what is older than the log is kept."""
        now = datetime.now(UTC)
        if self._serve.log_days is not None and now.date() != self._expired_on:
            expire_log(self._store, self._name, now=now, keep_days=self._serve.log_days)
            self._expired_on = now.date()

    def _tell(self, work: str, problem: str, exc: Exception | None = None) -> None:
        if self._problems.get(work) != problem:
            self._problems[work] = problem
            log.error("prediction log: %s", problem, exc_info=exc)

    def _solve(self, work: str) -> None:
        if problem := self._problems.pop(work, None):
            log.info("prediction log: solved: %s", problem)


def make_row(one: Noted, top_k: int, embedding_d: FloatArray | None) -> dict[str, Any]:
    """Return the row of an answer, without what concerns the kept image."""
    answer, timing = one.answer, one.answer.timing
    names = heapq.nlargest(top_k, answer.probabilities, key=answer.probabilities.__getitem__)
    return {
        "request_id": one.request_id,
        "time": datetime.fromtimestamp(one.at_s, UTC),
        "client_request_id": one.client_request_id,
        "client": one.client,
        "image_sha256": answer.sha256,
        "model_name": one.model.name,
        "model_version": one.model.version,
        "model_digest": one.model.digest,
        "model_engine": one.model.predictor.engine,
        "task": one.model.predictor.card.task,
        "classes": names,
        "probs": [answer.probabilities[name] for name in names],
        "prediction": answer.prediction,
        "labels": None if answer.labels is None else list(answer.labels),
        "confidence": answer.confidence,
        "abstained": answer.abstained is not None,
        "abstain_reason": answer.abstained,
        "distance": answer.distance,
        "embedding": embedding_d,
        "queue_ms": 1000 * timing.queue_s,
        "decode_ms": 1000 * timing.decode_s,
        "network_ms": 1000 * timing.network_s,
        "total_ms": one.total_ms,
        "cached": timing.is_cached,
        **(answer.quality or {}),
        "width": answer.size[0],
        "height": answer.size[1],
        "num_bytes": len(one.data),
    }


def list_spool(spool: Path) -> list[Path]:
    """Return what waits in a spool to be sent, images first. Half-written files and others' are left out."""
    paths = sorted(spool.glob(f"*{SLASH}date=*")) if spool.is_dir() else []
    paths = [path for path in paths if is_key(path.name.replace(SLASH, "/"))]
    return sorted(paths, key=lambda path: path.suffix == ".parquet")


def _measure_spool(spool: Path) -> dict[Path, int]:
    """Return what waits in a spool, images first, with its bytes."""
    sizes = {}
    for path in list_spool(spool):
        with contextlib.suppress(FileNotFoundError):  # another server of this workspace has sent it
            sizes[path] = path.stat().st_size
    return sizes
