"""One map over items or chunks: threads, processes of this machine, or a Ray cluster through joblib's backends.

Threads share Python's lock for about a seventh of what it takes to decode a photo: they are for short work, and for
reading. What runs in a process or on a cluster is picklable and opens what it needs itself. However a map ends, by an
error, Ctrl-C or an early `close`, it leaves no worker behind.
"""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from visionloop.errors import ParamsError, VisionLoopError
from visionloop.lifetime import die_with_parents

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
# A Unix socket's path has 107 characters at most, and Ray's own part of it takes up to 65.
MAX_RAY_FOLDER = 42
KNOCK_S = 5.0


@dataclass(frozen=True)
class Engine:
    """Where chunks run. `address` is a Ray cluster's; None starts one on this machine, for the length of a map."""

    kind: Literal["threads", "processes", "ray"]
    address: str | None = None


def count_cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items, in threads; at most a few are in memory at a time."""
    workers = workers or count_cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="map")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_chunks(
    function: Callable[[Item], Result], chunks: Iterable[Item], engine: Engine, *, max_held: int
) -> Iterator[Result]:
    """Yield `function(chunk)` of every chunk, in any order; at most `max_held` results (or one a core) are held.

    Raises:
        ParamsError: the engine cannot be had.
    """
    if engine.kind == "threads":
        yield from map_parallel(function, chunks)
    elif engine.kind == "processes":
        yield from _map_in_processes(function, chunks, max_held)
    else:
        with _connect_ray(engine.address) as workers, _translate_ray():
            # Ray's pool reserves no cores for its actors: without this they would all share the first node.
            spread = {"ray_remote_args": {"scheduling_strategy": "SPREAD"}}
            yield from _map_in_waves("ray", workers, function, chunks, max_held, **spread)


def _map_in_processes(function: Callable[[Item], Result], chunks: Iterable[Item], max_held: int) -> Iterator[Result]:
    from joblib.externals.loky import get_reusable_executor

    try:
        options = {"return_as": "generator_unordered", "initializer": _start_worker, "initargs": (os.getpid(),)}
        yield from _map_in_waves("loky", count_cores(), function, chunks, max_held, **options)
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def _map_in_waves(
    backend: str,
    workers: int,
    function: Callable[[Item], Result],
    chunks: Iterable[Item],
    max_held: int,
    **options: Any,
) -> Iterator[Result]:
    """Run so many chunks that their results fit in memory, then the next: joblib itself would run ahead without end."""
    from joblib import Parallel, delayed

    waiting = iter(chunks)
    with Parallel(n_jobs=workers, backend=backend, batch_size=1, **options) as pool:
        while wave := list(islice(waiting, max(workers, max_held))):
            yield from pool(delayed(function)(chunk) for chunk in wave)


def _start_worker(parent_pid: int) -> None:
    """Leave Ctrl-C to the parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parents(parent_pid)


@contextlib.contextmanager
def _connect_ray(address: str | None) -> Iterator[int]:
    """Join or start a cluster, let joblib use it, and yield its number of cores. Raises ParamsError."""
    with connect_ray(address, key="compute.engine", instead="engine: local") as ray:
        from ray.util import joblib as ray_joblib

        backend: Any = ray_joblib
        backend.register_ray()
        yield max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextlib.contextmanager
def connect_ray(address: str | None, *, key: str, instead: str) -> Iterator[Any]:
    """Join a cluster, or start one on this machine, and yield the module `ray`. A cluster that was there stays.

    `key` of params.yaml asked for it, and `instead` does without. Raises ParamsError.
    """
    ray: Any
    try:
        import ray
    except ImportError as exc:
        raise ParamsError(
            f"params.yaml {key}",
            "got 'ray', which is not installed",
            "the extra `ray`",
            f"Run `pip install 'visionloop[ray]'`, or set `{instead}`.",
        ) from exc
    address = address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            options: dict[str, Any] = {"address": address}
            if address is None:  # whoever reaches a cluster's ports may run code on it: ours is for this machine alone
                options = {"_temp_dir": _make_ray_folder(stack), "_node_ip_address": "127.0.0.1"}
                options["include_dashboard"] = False
            try:
                _knock(address)
                ray.init(log_to_driver=False, logging_level="ERROR", **options)
            except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as exc:
                raise ParamsError(
                    "params.yaml compute.address",
                    f"no Ray cluster at {address or 'this machine'} ({str(exc).splitlines()[0][:120]})",
                    "the address of a running cluster",
                    f"Start one with `ray start --head`, or set `{instead}`.",
                ) from exc
            stack.callback(ray.shutdown)
        yield ray


@contextlib.contextmanager
def _translate_ray() -> Iterator[None]:
    """Raise what a function raised on a node as it was raised there; Ray wraps it into pages of traceback."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, VisionLoopError):
            raise exc.cause from None
        if "No module named" in str(exc):
            raise ParamsError(
                "params.yaml compute.engine",
                f"a node of the Ray cluster cannot import what it needs ({str(exc).splitlines()[-1][:120]})",
                "this version of visionloop on every node",
                "Install it there, or set `engine: local`.",
            ) from exc
        raise


def _knock(address: str | None) -> None:
    """Raise OSError where nobody listens at `host:port`: Ray itself would try for a minute."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()


def _make_ray_folder(stack: contextlib.ExitStack) -> str:
    """Return a folder for Ray's sockets: below TMPDIR, or a short one that is removed when the stack is closed."""
    folder = Path(tempfile.gettempdir()) / "ray"
    if len(str(folder)) <= MAX_RAY_FOLDER:
        return str(folder)
    short = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    stack.callback(shutil.rmtree, short, ignore_errors=True)
    return short
