"""The ranks of one training: who this process is, how it joins the others, and what rank 0 tells them.

Values are exchanged as JSON over gloo, on GPUs too; nothing is pickled. A rank that fails ends; the others notice it by
the broken connection. `is_peer_failure` says whether an error is such a consequence, or a cause; the cause is what the
launcher is told of, in the file that torch.distributed.elastic keeps for each rank.

Dimensions: n images, u units.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from visionloop import errors
from visionloop.errors import ParamsError, SettingsError, TrainingError, VisionLoopError, describe_first_line
from visionloop.params import Compute
from visionloop.records import canonical_json

# How long a rank waits for the others: to come, and at each step. A rank that dies is noticed at once, without it.
WAIT_LIMIT = timedelta(minutes=10)
# A network file system may show a new file late.
SHARED_WITHIN_S = 15.0
PEER_SIGNS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
PADDING = -1


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this is. Rank 0 alone writes, logs and tells.

    `local_rank` of `local_size` is its place on this machine; `on_ray`: they are workers of Ray Train.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    on_ray: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0


class PeerLost(TrainingError):
    """Another rank is gone: a consequence, which is told only where its cause is not known."""


def read_world(env: Mapping[str, str], *, on_ray: bool = False) -> World:
    """Read what torchrun, or a launcher that sets the same variables, says this process is; alone if it says nothing.

    Raises:
        SettingsError: the variables contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not (env.get("RANK") and env.get("WORLD_SIZE")):
        return World()
    given = ", ".join(f"{name}={env[name]}" for name in (*names, "MASTER_ADDR") if name in env)
    try:
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank, local_size = int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError:
        rank, size, local_rank, local_size = -1, 0, 0, 1
    fits = 0 <= rank < size and 0 <= local_rank < local_size <= size and size % local_size == 0
    if not fits or (size > 1 and not on_ray and not (env.get("MASTER_ADDR") and env.get("MASTER_PORT"))):
        raise SettingsError(
            "environment",
            f"has {given}",
            "RANK < WORLD_SIZE, LOCAL_RANK < LOCAL_WORLD_SIZE, the latter equal on all nodes, MASTER_ADDR, MASTER_PORT",
            "Start with torchrun, or unset RANK and WORLD_SIZE to train in one process.",
        )
    return World(rank, size, local_rank, local_size, on_ray)


def choose_accelerator(section: Compute, num_gpus: int) -> str:
    """Resolve `compute.accelerator` to cpu or gpu. Raises ParamsError when a GPU is asked for where there is none."""
    if section.accelerator == "gpu" and not num_gpus:
        raise ParamsError(
            "params.yaml compute.accelerator",
            f"got 'gpu', and torch {torch.__version__} sees none on this machine",
            "a GPU with its driver, or `auto` or `cpu`",
            "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or edit the file.",
        )
    return "gpu" if num_gpus and section.accelerator != "cpu" else "cpu"


def count_gpus() -> int:
    """Return how many GPUs torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextlib.contextmanager
def join_world(world: World, section: Compute, folder: Path) -> Iterator[None]:
    """Connect this rank with the others: gloo on a CPU, nccl beside it on GPUs. Nothing to do for a process alone.

    Raises:
        TrainingError: the others do not come, this machine has fewer GPUs than ranks, or they do not share `folder`.
    """
    if world.size == 1:
        yield
        return
    accelerator = choose_accelerator(section, count_gpus())
    if accelerator == "gpu" and not world.on_ray:  # Ray has chosen the device already
        _take_gpu(world)
    started = not distributed.is_initialized()
    if started:
        backend = "cpu:gloo,cuda:nccl" if accelerator == "gpu" else "gloo"
        try:
            distributed.init_process_group(backend, timeout=WAIT_LIMIT)
        except (RuntimeError, ValueError) as exc:
            raise TrainingError(
                f"rank {world.rank} of {world.size}",
                f"cannot join the others ({describe_first_line(exc, 200)})",
                f"all of them at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within "
                f"{WAIT_LIMIT.seconds // 60} minutes",
                "Look at the other ranks, and at the firewall between the nodes.",
            ) from exc
    check_shared_folder(world, folder)
    yield
    # Only after success: with a rank gone, this would wait for it.
    if started:
        distributed.destroy_process_group()


def _take_gpu(world: World) -> None:
    if world.local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"rank {world.rank} of {world.size}",
            f"is number {world.local_rank + 1} on {socket.gethostname()}, which has {torch.cuda.device_count()} GPUs",
            "a GPU for each rank",
            "Lower --nproc-per-node, or set compute.accelerator: cpu.",
        )
    torch.cuda.set_device(world.local_rank)


def share(world: World, make: Callable[[], Any]) -> Any:
    """Return on every rank the JSON value that `make()` gives on rank 0. Every rank calls it, in the same order."""
    if world.size == 1:
        return make()
    data = torch.frombuffer(bytearray(canonical_json(make())), dtype=torch.uint8) if world.is_first else torch.empty(0)
    length = torch.tensor([len(data)])
    distributed.broadcast(length, 0)
    buffer = data if world.is_first else torch.empty(int(length), dtype=torch.uint8)
    distributed.broadcast(buffer, 0)
    return json.loads(bytes(buffer.tolist()))


def gather(world: World, value: Any) -> list[Any]:
    """Return every rank's JSON value, on every rank, in the order of the ranks."""
    if world.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(canonical_json(value)), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    distributed.all_gather(lengths, torch.tensor([len(data)]))
    longest = max(int(length) for length in lengths)
    buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(world.size)]
    distributed.all_gather(buffers, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(b[: int(n)].tolist())) for b, n in zip(buffers, lengths, strict=True)]


def check_shared_folder(world: World, folder: Path) -> None:
    """Raise TrainingError, on every rank, unless all of them see a file that rank 0 writes into the folder."""
    token = share(world, lambda: _write_token(folder))
    sees = _sees_token(folder, token)
    seen = gather(world, {"host": socket.gethostname(), "sees": sees})
    if world.is_first:
        (folder / token).unlink()
    if blind := [f"rank {rank} on {one['host']}" for rank, one in enumerate(seen) if not one["sees"]]:
        raise TrainingError(
            f"workspace {folder.parent}",
            f"{blind[0]} does not see what rank 0 on {seen[0]['host']} writes there",
            "a folder that all nodes share",
            "Put the workspace on a shared file system (NFS, EFS, Lustre), at the same path on every node.",
        )


def _write_token(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"shared-{secrets.token_hex(8)}"
    (folder / name).write_text("")
    return name


def _sees_token(folder: Path, token: str) -> bool:
    deadline = time.monotonic() + SHARED_WITHIN_S
    while not (folder / token).is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def compare_facts(world: World, facts: Mapping[str, str]) -> None:
    """Raise TrainingError, on every rank, unless all have the same facts: what differs (name) -> value or digest."""
    everyone = gather(world, {"host": socket.gethostname(), "facts": dict(facts)})
    first = everyone[0]["facts"]
    for rank, other in enumerate(everyone):
        theirs = other["facts"]
        if differing := [name for name, value in first.items() if theirs[name] != value]:
            name = differing[0]
            raise TrainingError(
                f"rank {rank} of {world.size} on {other['host']}",
                f"has {name} than rank 0 ({theirs[name][:16]}, not {first[name][:16]})",
                "the same on all ranks",
                "Use one workspace and one visionloop everywhere; set train.precision and compute.accelerator.",
            )


def choose_strategy(world: World) -> dict[str, Any]:
    """Return the Trainer's options about ranks. `plugins` is a list, which may be added to."""
    options: dict[str, Any] = {
        "devices": world.local_size,
        "num_nodes": world.size // world.local_size,
        "plugins": [],
    }
    if world.size == 1:
        return options
    if world.on_ray:
        import ray.train.lightning

        rays: Any = ray.train.lightning
        return {**options, "strategy": rays.RayDDPStrategy(), "plugins": [rays.RayLightningEnvironment()]}
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from pytorch_lightning.strategies import DDPStrategy

    return {**options, "strategy": DDPStrategy(timeout=WAIT_LIMIT), "plugins": [TorchElasticEnvironment()]}


def is_peer_failure(exc: BaseException | None) -> bool:
    """Say whether an error, or what caused it, only tells that another rank is gone."""
    while exc is not None:
        if isinstance(exc, distributed.DistError):
            return True
        torchs = isinstance(exc, RuntimeError) and not isinstance(exc, VisionLoopError)
        if isinstance(exc, PeerLost) or (torchs and any(sign in str(exc).lower() for sign in PEER_SIGNS)):
            return True
        exc = exc.__cause__
    return False


def gather_rows(units_nu: Tensor, targets: Tensor, rows_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return units, targets and rows of all ranks, in the order of the rows, each row once, padding dropped."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        units_nu, targets, rows_n = (_gather(part) for part in (units_nu, targets, rows_n))
    rows_n, order = torch.sort(rows_n, stable=True)
    is_new = torch.ones_like(rows_n, dtype=torch.bool)
    is_new[1:] = rows_n[1:] != rows_n[:-1]
    keep = order[is_new & (rows_n != PADDING)]
    return units_nu[keep], targets[keep], rows_n[is_new & (rows_n != PADDING)]


def _gather(part: Tensor) -> Tensor:
    """Concatenate the parts of all ranks, which may be of any lengths."""
    ranks = distributed.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(ranks)]
    distributed.all_gather(lengths, torch.tensor([len(part)], device=part.device))
    sizes = [int(length) for length in lengths]
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(parts, padded.contiguous())
    return torch.cat([whole[:size] for whole, size in zip(parts, sizes, strict=True)])


STOPPED_CODES = (-signal.SIGTERM, 128 + signal.SIGTERM)
GO_ON = "The same command goes on from the last finished epoch."


def make_rank_error(world: World, exc: Exception) -> Exception:
    """Tell the loss of another rank from an error of this one; any of ours keeps its kind and names the rank."""
    if is_peer_failure(exc):
        reason = describe_first_line(exc.__cause__ or exc)
        return PeerLost(f"rank {world.rank} of {world.size}", f"lost another rank ({reason})", "all to go on", GO_ON)
    if isinstance(exc, VisionLoopError) and not world.is_first:
        where = f"rank {world.rank} of {world.size} on {socket.gethostname()}, {exc.where}"
        return type(exc)(where, exc.found, exc.expected, exc.todo)
    return exc


def write_error_file(error: Exception, env: Mapping[str, str]) -> None:
    """Write the file that torch.distributed.elastic reads: its message and time, and our error's parts beside them."""
    path = env.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    line = str(error) if isinstance(error, VisionLoopError) else f"{type(error).__name__}: {error}"
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    value: dict[str, Any] = {"message": {"message": line, "extraInfo": extra}}
    if isinstance(error, VisionLoopError):
        value["visionloop"] = [type(error).__name__, error.where, error.found, error.expected, error.todo]
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(value))


def explain_failures(failures: Mapping[int, Any], num_ranks: int) -> VisionLoopError:
    """Return the error of the rank that failed first, as it was raised there; else its signal or exit code.

    `failures`: rank -> torch's ProcessFailure. One that only lost another rank, or was stopped for that, is no cause.
    """
    ours = {rank: failure.error_file_data.get("visionloop") for rank, failure in failures.items()}
    stopped = {rank for rank, failure in failures.items() if failure.exitcode in STOPPED_CODES}
    causes = [rank for rank in failures if rank not in stopped and (ours[rank] or [""])[0] != PeerLost.__name__]
    rank = min(causes or failures, key=lambda rank: (failures[rank].timestamp, rank))
    failure, where = failures[rank], f"rank {rank} of {num_ranks}"
    if told := ours[rank]:
        kind, *parts = told
        return getattr(errors, kind, TrainingError)(*parts)
    if failure.exitcode < 0:
        name = failure.signal_name()
        hint = "The system kills so when memory runs out: lower train.batch_size then. " if name == "SIGKILL" else ""
        return TrainingError(where, f"was killed by {name} (process {failure.pid})", "all to go on", hint + GO_ON)
    said = failure.error_file_data.get("message")
    reason = f": {said['message'][:200]}" if isinstance(said, dict) else ""
    found = f"ended with exit code {failure.exitcode}{reason}"
    return TrainingError(where, found, "0", f"Look at what it printed above. {GO_ON}")
