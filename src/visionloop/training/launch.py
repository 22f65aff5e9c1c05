"""Where a training runs: in this process, as one rank of several, in ranks started on this machine, or on Ray.

A rank is a command line of its own (`python -m visionloop train`): nothing is forked, no command line re-executed.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from visionloop.errors import VisionLoopError
from visionloop.lifetime import GUARDIAN_VARIABLE, Terminated
from visionloop.parallel import count_cores
from visionloop.params import Params
from visionloop.records import RunNote
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.tracking import Tracking
from visionloop.training.failures import explain_failures, make_rank_error, write_error_file
from visionloop.training.fit import follow, train
from visionloop.training.hardware import choose_accelerator, count_gpus
from visionloop.training.job import World
from visionloop.training.plan import plan_launch
from visionloop.training.watch import Watcher
from visionloop.training.world import check_shared_folder, join_world, read_world

OURS = "visionloop-"  # what TORCHELASTIC_RUN_ID begins with in the ranks that we start
STOP_WITHIN_S = 20


def launch_train(
    settings: Settings,
    params: Params,
    store: ObjectStore,
    tracking: Tracking,
    *,
    now: str,
    code_digest: str = "",
    watcher: Watcher | None = None,
    env: Mapping[str, str],
) -> RunNote | None:
    """Train as `params.train` says: alone, as a rank, in ranks of this machine, or on Ray; return the run's note.

    None in a process that another one speaks for: a rank other than 0, or one that we started.

    Raises:
        ParamsError: there are not so many GPUs, nodes, or images in a batch.
        TrainingError: a rank failed or was killed; all others are stopped.
        VisionLoopError: what `fit.train` raises, also in another process.
    """
    world = read_world(env)
    plan = plan_launch(params.train, world, count_gpus())
    here: dict[str, Any] = {"now": now, "code_digest": code_digest, "watcher": watcher}
    if plan.kind == "here":
        return train(settings, params, store, tracking, **here)
    if plan.kind == "rank":
        with _report_failure(world, env):
            note = train_as_rank(settings, params, store, tracking, world=world, **here)
        return None if is_ours(env) else note
    if plan.kind == "ray":
        from visionloop.training.ray_workers import train_on_ray

        train_on_ray(settings, params, plan.devices, code_digest=code_digest, now=now, watcher=watcher or Watcher())
    else:
        _start_ranks(settings, plan.devices or 1)
    return read_note(settings)


def train_as_rank(
    settings: Settings,
    params: Params,
    store: ObjectStore,
    tracking: Tracking,
    *,
    world: World,
    now: str,
    code_digest: str,
    watcher: Watcher | None,
) -> RunNote | None:
    """Train together with the other ranks: rank 0 leads, and alone returns a note."""
    with join_world(world, choose_accelerator(params.train, count_gpus())):
        check_shared_folder(world, settings.hidden_dir)
        if world.is_first:
            how: dict[str, Any] = {"now": now, "code_digest": code_digest, "watcher": watcher, "world": world}
            return train(settings, params, store, tracking, **how)
        follow(settings, params, store, tracking, code_digest=code_digest, world=world)
    return None


def is_ours(env: Mapping[str, str]) -> bool:
    """Say whether this process is a rank that visionloop started: its launcher speaks for it."""
    return env.get("TORCHELASTIC_RUN_ID", "").startswith(OURS)


def read_note(settings: Settings) -> RunNote:
    """Return the note of the run that made models/candidate, as another process left it."""
    from visionloop.bundle import load_bundle

    digest = load_bundle(settings.candidate_dir).digest
    return RunNote.from_json(json.loads((settings.runs_dir / f"{digest}.json").read_text()))


def _start_ranks(settings: Settings, num_ranks: int) -> None:
    """Run `num_ranks` ranks on this machine to their end. Raises what failed, once all are stopped."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    (settings.hidden_dir / "tmp").mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="ranks-", dir=settings.hidden_dir / "tmp") as folder,
        _environment_of_ranks(settings, num_ranks),
        _keep_signal_handlers(),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=f"{OURS}{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=STOP_WITHIN_S,
        )
        _silence("torch.distributed.elastic")
        try:
            elastic_launch(config, sys.executable)("-m", "visionloop", "train")
        except ChildFailedError as exc:
            raise explain_failures(exc.failures, num_ranks) from None
        except SignalException as exc:
            _stop_like(exc.sigval)


@contextlib.contextmanager
def _environment_of_ranks(settings: Settings, num_ranks: int) -> Iterator[None]:
    """Set what our ranks inherit: this workspace, us as their guardian, their share of the cores, and the loopback."""
    ours = {
        "VISIONLOOP_HOME": str(settings.home),
        "VISIONLOOP_STORE": settings.store_url,
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
        GUARDIAN_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, count_cores() // num_ranks))),
    }
    if "lo" in {name for _, name in socket.if_nameindex()}:  # else gloo asks where the host's name leads: maybe nowhere
        ours["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    before = dict(os.environ)
    os.environ.update(ours)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Put the handlers back that the launcher replaces: it turns signals into exceptions of its own."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):  # not the main thread: nothing was replaced
                signal.signal(number, handler)


def _silence(prefix: str) -> None:
    """Turn off loggers that have a level of their own each: what they say is said by our error."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(prefix):
            logging.getLogger(name).disabled = True


def _stop_like(sigval: signal.Signals) -> NoReturn:
    raise KeyboardInterrupt if sigval == signal.SIGINT else Terminated


@contextlib.contextmanager
def _report_failure(world: World, env: Mapping[str, str]) -> Iterator[None]:
    """Leave a rank's error where torchrun, and our own launcher, look for it; ours alone says it then."""
    try:
        yield
    except Exception as exc:
        error = make_rank_error(world, exc)
        write_error_file(error, env)
        if is_ours(env) and isinstance(error, VisionLoopError):
            raise SystemExit(error.exit_code) from None
        raise error from exc
