"""Training on a Ray cluster: Ray Train places the workers and connects them; each then is a rank like any other.

What rank 0 tells comes back through a queue, so that the person who waits sees it here.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from visionloop.errors import ParamsError, TrainingError, VisionLoopError
from visionloop.parallel import connect_ray
from visionloop.params import Params, make_params
from visionloop.settings import Settings, apply_tool_environment
from visionloop.training.job import Call
from visionloop.training.watch import EpochReport, StepReport, Watcher
from visionloop.workspace import Workspace, connect

# What workers take over from the driver's environment: where things are, and how to get in.
PASSED_ON = ("AWS_", "MLFLOW_", "VISIONLOOP_")
LISTEN_EVERY_S = 0.2


@dataclass(frozen=True)
class Order:
    """All that a worker needs to know: small, and made of builtins."""

    settings: Settings
    params: dict[str, Any]
    environment: dict[str, str]
    code_digest: str
    now: str
    queue: Any


@dataclass(frozen=True)
class Shape:
    """How many workers, with what each."""

    devices: int
    num_nodes: int
    cpus: int
    on_gpu: bool

    @property
    def size(self) -> int:
        return self.devices * self.num_nodes


def train_on_ray(workspace: Workspace, call: Call, devices: int | None) -> None:
    """Train in workers of a Ray cluster (`compute.address`, RAY_ADDRESS, or one of its own on this machine).

    Raises:
        ParamsError: Ray, a cluster, or enough of it cannot be had.
        VisionLoopError: what rank 0, or the rank that failed first, raised.
    """
    params = workspace.params
    with connect_ray(params.compute.address, key="compute.strategy", instead="strategy: auto") as ray:
        from ray.util.queue import Queue

        shape = choose_shape(params, devices, _list_nodes(ray))
        queue = Queue(actor_options={"num_cpus": 0})
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        values = params.model_dump(mode="json")
        order = Order(workspace.settings, values, passed, call.code_digest, call.now, queue)
        storage = workspace.settings.hidden_dir / "ray"
        try:
            with _translate(shape):
                _run_and_listen(_make_trainer(order, shape, str(storage)), queue, call.watcher)
        finally:
            shutil.rmtree(storage, ignore_errors=True)


def choose_shape(params: Params, devices: int | None, nodes: list[dict[str, float]]) -> Shape:
    """Decide on workers a node, and cores a worker, from what the cluster's nodes have. Raises ParamsError."""
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    gpus = sorted((int(node.get("GPU", 0)) for node in nodes if node.get("GPU", 0) >= 1), reverse=True)
    section = params.compute
    on_gpu = section.accelerator == "gpu" or (section.accelerator == "auto" and bool(gpus))
    if devices is None:
        devices = min(gpus[: section.num_nodes]) if on_gpu and gpus else 1
    has = f"{len(cpus)} nodes with {sum(cpus)} cores and {sum(gpus)} GPUs"
    size, free = devices * section.num_nodes, sum(gpus) if on_gpu else sum(cpus)
    if size > free:
        raise ParamsError(
            "params.yaml compute.devices",
            f"got {devices} on {section.num_nodes} nodes, and the Ray cluster has {has}",
            f"a {'GPU' if on_gpu else 'core'} for each of the {size} workers",
            "Lower devices or num_nodes, or add nodes to the cluster before the start.",
        )
    if size > params.train.batch_size:
        found = f"got {params.train.batch_size} for {size} workers"
        raise ParamsError("params.yaml train.batch_size", found, "one image or more for each of them", "Edit the file.")
    return Shape(devices, section.num_nodes, max(1, min(cpus) // devices), on_gpu)


def _list_nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _make_trainer(order: Order, shape: Shape, storage: str) -> Any:
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from visionloop.training.ranks.world import WAIT_LIMIT

    run: Any = RunConfig(
        name=f"visionloop-{os.getpid()}-{time.time_ns()}",
        storage_path=storage,
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        logging_config=LoggingConfig(log_level="ERROR"),
    )
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    return TorchTrainer(
        partial(_work, order),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if shape.on_gpu else "gloo", timeout_s=WAIT_LIMIT.seconds
        ),
        scaling_config=ScalingConfig(
            num_workers=shape.size,
            use_gpu=shape.on_gpu,
            resources_per_worker={"CPU": shape.cpus, **({"GPU": 1} if shape.on_gpu else {})},
            placement_strategy="SPREAD" if shape.num_nodes > 1 else "PACK",
        ),
        run_config=run,
    )


def _work(order: Order) -> None:
    """Be a rank: runs in a worker, on whatever node."""
    os.environ.update(order.environment)
    apply_tool_environment(order.settings.home)
    from visionloop.training.checks import check_training
    from visionloop.training.fit import train
    from visionloop.training.ranks.world import make_rank_error, read_world

    world = read_world(os.environ, on_ray=True)
    try:
        workspace = connect(order.settings, make_params(order.params))
        train(
            workspace, check_training(workspace), Call(order.now, order.code_digest, QueueWatcher(order.queue), world)
        )
    except Exception as exc:
        raise make_rank_error(world, exc) from None


class QueueWatcher(Watcher):
    """Sends what rank 0 tells to the driver. Steps are not waited for."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def tell(self, line: str) -> None:
        self.queue.put(("tell", line))

    def on_step(self, report: StepReport) -> None:
        self.queue.actor.put_nowait.remote(("on_step", report))

    def on_epoch(self, report: EpochReport) -> None:
        self.queue.put(("on_epoch", report))


def _run_and_listen(trainer: Any, queue: Any, watcher: Watcher) -> None:
    """Run the workers to their end, and tell the watcher what comes. Raises what the trainer raised.

    The trainer has a thread of its own: in the main one it would answer Ctrl-C by leaving with exit code 0.
    """
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    while thread.is_alive():
        thread.join(LISTEN_EVERY_S)
        _tell_all(queue, watcher)
    _tell_all(queue, watcher)
    if failed:
        raise failed[0]


def _tell_all(queue: Any, watcher: Watcher) -> None:
    from ray.exceptions import RayError

    with contextlib.suppress(RayError):  # the cluster went: the trainer says so
        while number := queue.qsize():
            for name, value in queue.get_nowait_batch(number):
                getattr(watcher, name)(value)


@contextlib.contextmanager
def _translate(shape: Shape) -> Iterator[None]:
    """Raise a worker's error as it was raised there, and Ray's own as one line."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    from visionloop.training.ranks.world import GO_ON, PeerLost

    try:
        yield
    except TrainingFailedError as exc:
        failures: dict[int, BaseException] = getattr(exc, "worker_failures", {}) or {}
        causes = {rank: one for rank, one in failures.items() if not isinstance(one, PeerLost)} or failures
        for rank, one in sorted(causes.items()):
            if isinstance(one, VisionLoopError):
                raise one from None
            reason = " ".join(str(one).split())[:200]
            found = f"ended ({type(one).__name__}: {reason})"
            if hasattr(one, "health_check_failure"):
                found = "is gone: its process was killed, or its node is lost (memory that ran out looks like this too)"
            raise TrainingError(f"rank {rank} of {shape.size} on Ray", found, "all to go on", GO_ON) from exc
        reason = " ".join(str(exc).split())[:300]
        raise TrainingError("Ray Train", f"failed ({reason})", "workers that start", GO_ON) from exc
    except RayError as exc:
        reason = " ".join(str(exc).split())[:300]
        raise TrainingError("Ray", f"failed ({reason})", "a cluster that stays", GO_ON) from exc
