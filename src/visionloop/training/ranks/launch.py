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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NoReturn

from visionloop.errors import ParamsError, VisionLoopError
from visionloop.lifetime import GUARDIAN_VARIABLE, Terminated
from visionloop.parallel import count_cores
from visionloop.params import Params
from visionloop.params.train import WAYS_ON_EMBEDDINGS
from visionloop.records import RunNote
from visionloop.settings import Settings
from visionloop.training.checks import TrainingData
from visionloop.training.ranks.world import (
    World,
    choose_accelerator,
    count_gpus,
    explain_failures,
    make_rank_error,
    read_world,
    write_error_file,
)
from visionloop.workspace import Workspace

if TYPE_CHECKING:
    from visionloop.training.job import Call

OURS = "visionloop-"  # what TORCHELASTIC_RUN_ID begins with in the ranks that we start
STOP_WITHIN_S = 20


@dataclass(frozen=True)
class LaunchPlan:
    """`here`: this process alone; `rank`: one of a world that exists; `ddp`: start ranks; `ray`: start workers.

    `devices` is the number of ranks a node; None for Ray where the cluster decides.
    """

    kind: Literal["here", "rank", "ddp", "ray"]
    devices: int | None = 1
    num_nodes: int = 1


def plan_launch(params: Params, world: World, num_gpus: int) -> LaunchPlan:
    """Decide where a training runs, from params, what torchrun says, and this machine's GPUs. Raises ParamsError."""
    train, section = params.train, params.compute
    devices = None if section.devices == "auto" else section.devices
    asked = (devices or 1) * section.num_nodes
    if train.way in WAYS_ON_EMBEDDINGS:
        if max(asked, world.size) > 1:
            raise _refuse("train.way", f"{train.way!r} in {max(asked, world.size)} processes", "one: it sees no images")
        return LaunchPlan("here")
    size = max(asked, world.size)
    if size > train.batch_size:
        found = f"{train.batch_size} for {size} processes"
        raise _refuse("train.batch_size", found, "one image or more for each of them")
    if world.size > 1 or world.on_ray:
        if section.strategy == "ray" and not world.on_ray:
            expected = "`auto` or `ddp` there, or one command without torchrun"
            raise _refuse("compute.strategy", "'ray' under torchrun", expected)
        if devices and asked != world.size:
            found = f"{devices} x {section.num_nodes} nodes in a world of {world.size}"
            raise _refuse("compute.devices", found, "as many")
        return LaunchPlan("rank", world.local_size, world.size // world.local_size)
    if section.strategy == "ray":
        return LaunchPlan("ray", devices, section.num_nodes)
    if section.num_nodes > 1:
        raise _refuse(
            "compute.num_nodes",
            f"{section.num_nodes}, and this process was not started by torchrun",
            "1, `strategy: ray`, or torchrun on every node",
            "Run `torchrun --nnodes N --nproc-per-node M ... -m visionloop train` on each (docs/training.md).",
        )
    on_gpu = choose_accelerator(section, num_gpus) == "gpu"
    if on_gpu and devices and devices > num_gpus:
        raise _refuse(
            "compute.devices", str(devices), f"at most the {num_gpus} GPUs of this machine, or `accelerator: cpu`"
        )
    devices = devices or (min(num_gpus, train.batch_size) if on_gpu else 1)
    return LaunchPlan("here" if devices == 1 else "ddp", devices)


def _refuse(key: str, found: str, expected: str, todo: str = "Edit the file.") -> ParamsError:
    return ParamsError(f"params.yaml {key}", f"got {found}", expected, todo)


def describe_launch(plan: LaunchPlan) -> str:
    """Say where a training would run, in words."""
    if plan.kind == "ray":
        each = f"{plan.devices} a node, " if plan.devices else ""
        return f"in workers of Ray Train ({each}{plan.num_nodes} node{'s' if plan.num_nodes > 1 else ''})"
    number = (plan.devices or 1) * plan.num_nodes
    return "in one process" if number == 1 else f"in {number} processes"


def launch_train(workspace: Workspace, data: TrainingData, call: "Call", env: Mapping[str, str]) -> RunNote | None:
    """Train as `params.compute` says: alone, as a rank, in ranks of this machine, or on Ray; return the run's note.

    The world of the call is what `env` says. None in a process that another one speaks for: a rank other than 0, or
    one that we started.

    Raises:
        ParamsError: there are not so many GPUs, nodes, or images in a batch.
        TrainingError: a rank failed or was killed; all others are stopped.
        VisionLoopError: what `fit.train` raises, also in another process.
    """
    call = replace(call, world=read_world(env))
    plan = plan_launch(workspace.params, call.world, count_gpus())
    if plan.kind in {"here", "rank"}:
        from visionloop.training.fit import train

        with _report_failure(call.world, env):
            note = train(workspace, data, call)
        return None if is_ours(env) else note
    if plan.kind == "ray":
        from visionloop.training.ranks.ray import train_on_ray

        train_on_ray(workspace, call, plan.devices)
    else:
        _start_ranks(workspace.settings, plan.devices or 1)
    return read_note(workspace.settings)


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
        if error is exc:
            raise
        raise error from exc
