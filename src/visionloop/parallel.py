"""One map over items or chunks: in threads, in processes of this machine, or on a Ray cluster, through joblib.

Decoding a photo holds Python's global lock for about a seventh of its time, so threads are for short work and for
reading. A function for processes or a cluster must be picklable, and opens files and stores itself. No worker stays
after a map, even after an error, Ctrl-C or an early `close`.
"""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from visionloop.errors import ParamsError, VisionLoopError, describe_first_line, describe_install
from visionloop.lifetime import die_with_parents

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
# A Unix socket's path has 107 characters at most, and Ray's own part of it takes up to 65.
MAX_RAY_FOLDER = 42
KNOCK_S = 5.0
RAY_TRIES = 3
HOW_TO_REACH = "a node takes HEAD:6379, any other machine ray://HEAD:10001, each with its RAY_AUTH_TOKEN and release"


@dataclass(frozen=True)
class Engine:
    """Where chunks run. `address` is that of a Ray cluster. None starts one on this machine while the map runs."""

    kind: Literal["threads", "processes", "ray"]
    address: str | None = None


def count_cores() -> int:
    """Return the cores this process may use, by affinity and by the limit of its container (cgroup v2 or v1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, _read_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))]))


def _read_quotas(own: Path, root: Path) -> Iterator[float]:
    """Yield how many cores each of this process's control groups may use; those without a limit say nothing.

    A group's limit holds for all below it. Inside of a container the root may be its own group, whatever `own` says.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        top = root if not controllers else root / controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (quota := _read_quota(folder)):
                yield quota


def _read_quota(folder: Path) -> float | None:
    """Return the cores of one control group, by `cpu.max` (v2) or `cpu.cfs_quota_us` (v1); None without a limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = map(float, (folder / "cpu.max").read_text().split())
        else:
            quota, period = (float((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 and period > 0 else None
    except (OSError, ValueError):
        return None


def map_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None, ahead: int = 0
) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items, computed in threads. A few are in memory at a time.

    `ahead`: at least so many are computed while the caller is busy with earlier ones.
    """
    workers = workers or count_cores()
    ahead = max(ahead, AHEAD * workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="map")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_chunks(
    function: Callable[[Item], Result], chunks: Iterable[Item], engine: Engine, *, max_held: int
) -> Iterator[Result]:
    """Yield `function(chunk)` of every chunk. With processes and Ray the order is not fixed.

    At most `max_held` results wait at a time (or one for each core, if that is more).

    Raises:
        ParamsError: the engine is not installed or cannot be reached.
    """
    if engine.kind == "threads":
        yield from map_parallel(function, chunks)
    elif engine.kind == "processes":
        yield from _map_in_processes(function, chunks, max_held)
    else:
        with _connect_ray(engine.address) as workers, _translate_ray():
            # Ray's pool reserves no cores for its actors. Without this all of them would run on the first node.
            spread = {"ray_remote_args": {"scheduling_strategy": "SPREAD"}}
            yield from _map_in_waves("ray", workers, function, chunks, max_held, **spread)


def _map_in_processes(function: Callable[[Item], Result], chunks: Iterable[Item], max_held: int) -> Iterator[Result]:
    from joblib.externals.loky import get_reusable_executor

    try:
        options = {"return_as": "generator_unordered", "initializer": _start_worker, "initargs": (os.getpid(),)}
        yield from _map_in_waves("loky", count_cores(), function, chunks, max_held, **options)
    finally:
        # `reuse`: asked for without it, joblib first ends its own workers politely, and makes others to be killed.
        get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


def _map_in_waves(
    backend: str,
    workers: int,
    function: Callable[[Item], Result],
    chunks: Iterable[Item],
    max_held: int,
    **options: Any,
) -> Iterator[Result]:
    """Run `max_held` chunks, then the next ones: joblib alone would compute on without a limit on waiting results."""
    from joblib import Parallel, delayed

    waiting = iter(chunks)
    with Parallel(n_jobs=workers, backend=backend, batch_size=1, **options) as pool:
        while wave := list(islice(waiting, max(workers, max_held))):
            yield from pool(delayed(function)(chunk) for chunk in wave)


def _start_worker(parent_pid: int) -> None:
    """Let only the parent react to Ctrl-C, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parents(parent_pid)


@contextlib.contextmanager
def _connect_ray(address: str | None) -> Iterator[int]:
    """Connect to a cluster or start one, register it with joblib, and yield its number of cores. Raises ParamsError."""
    with connect_ray(address, key="compute.engine", instead="engine: local") as ray:
        from ray.util import joblib as ray_joblib

        backend: Any = ray_joblib
        backend.register_ray()
        yield max(1, int(ray.cluster_resources().get("CPU", 1)))


@contextlib.contextmanager
def connect_ray(address: str | None, *, key: str, instead: str) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine, and yield the module `ray`. Stops only what it started.

    Errors name `key`, the key of params.yaml that asks for Ray, and `instead`, a setting without it. Raises
    ParamsError.
    """
    ray: Any
    try:
        import ray
    except ImportError as exc:
        raise ParamsError(
            f"params.yaml {key}",
            "got 'ray', which is not installed",
            "the extra `ray`",
            f"Run `{describe_install('ray')}`, or set `{instead}`.",
        ) from exc
    address = address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            options: dict[str, Any] = {"address": address}
            if address is None:  # anybody who reaches a cluster's ports can run code: listen on this machine only
                options = {"_temp_dir": _make_ray_folder(stack), "_node_ip_address": "127.0.0.1"}
                options["include_dashboard"] = False
            todo = "Start one with `ray start --head`"
            try:
                if _knock(address):
                    todo = f"Something listens there: {HOW_TO_REACH}"
                with warnings.catch_warnings(action="ignore"):  # what they say, the error below says
                    _init_ray(ray, log_to_driver=False, logging_level="ERROR", **options)
            except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as exc:
                raise ParamsError(
                    "params.yaml compute.address",
                    f"no Ray cluster at {address or 'this machine'} ({describe_first_line(exc, 120)})",
                    "the address of a running cluster",
                    f"{todo}, or set `{instead}`.",
                ) from exc
            stack.callback(ray.shutdown)
        yield ray


def _init_ray(ray: Any, **options: Any) -> None:
    """As `ray.init`, and again when the head answers, but could not start the process that is to serve this client.

    It is forked from one of many threads. On a busy head it now and then hangs there for half a minute, and dies.
    """
    for tries_left in reversed(range(RAY_TRIES)):
        try:
            ray.init(**options)
            return
        except ConnectionAbortedError as exc:
            if not tries_left:  # the traceback of the head: what is wrong is in its last line
                raise ConnectionAbortedError(str(exc).strip().rpartition("\n")[2]) from exc


@contextlib.contextmanager
def _translate_ray() -> Iterator[None]:
    """Raise the original error of a function on a node, without the long traceback that Ray puts around it."""
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


def _knock(address: str | None) -> bool:
    """Say whether something listens at `host:port`, or raise OSError: Ray itself would try for a minute."""
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return False
    socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
    return True


def _make_ray_folder(stack: contextlib.ExitStack) -> str:
    """Return a folder for Ray's sockets: below TMPDIR, or a shorter one that is removed when the stack is closed."""
    folder = Path(tempfile.gettempdir()) / "ray"
    if len(str(folder)) <= MAX_RAY_FOLDER:
        return str(folder)
    short = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    stack.callback(shutil.rmtree, short, ignore_errors=True)
    return short
