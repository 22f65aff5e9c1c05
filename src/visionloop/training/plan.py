"""Where a training is to run: decided from params, what a launcher says, and the GPUs there are. Starts nothing."""

from dataclasses import dataclass
from typing import Literal

from visionloop.errors import ParamsError
from visionloop.params import Train
from visionloop.params.train import WAYS_ON_EMBEDDINGS
from visionloop.training.hardware import choose_accelerator
from visionloop.training.job import World


@dataclass(frozen=True)
class Plan:
    """`here`: this process alone; `rank`: one of a world that exists; `ddp`: start ranks; `ray`: start workers.

    `devices` is the number of ranks a node; None for Ray where the cluster decides.
    """

    kind: Literal["here", "rank", "ddp", "ray"]
    devices: int | None = 1
    num_nodes: int = 1


def plan_launch(section: Train, world: World, num_gpus: int) -> Plan:
    """Decide where a training runs, from params, what torchrun says, and this machine's GPUs. Raises ParamsError."""
    devices = None if section.devices == "auto" else section.devices
    asked = (devices or 1) * section.num_nodes
    if section.way in WAYS_ON_EMBEDDINGS:
        if max(asked, world.size) > 1:
            raise _refuse("way", f"{section.way!r} in {max(asked, world.size)} processes", "one: it sees no images")
        return Plan("here")
    size = max(asked, world.size)
    if size > section.batch_size:
        raise _refuse("batch_size", f"{section.batch_size} for {size} processes", "one image or more for each of them")
    if world.size > 1 or world.on_ray:
        if section.strategy == "ray" and not world.on_ray:
            raise _refuse("strategy", "'ray' under torchrun", "`auto` or `ddp` there, or one command without torchrun")
        if devices and asked != world.size:
            raise _refuse("devices", f"{devices} x {section.num_nodes} nodes in a world of {world.size}", "as many")
        return Plan("rank", world.local_size, world.size // world.local_size)
    if section.strategy == "ray":
        return Plan("ray", devices, section.num_nodes)
    if section.num_nodes > 1:
        raise _refuse(
            "num_nodes",
            f"{section.num_nodes}, and this process was not started by torchrun",
            "1, `strategy: ray`, or torchrun on every node",
            "Run `torchrun --nnodes N --nproc-per-node M ... -m visionloop train` on each (docs/training.md).",
        )
    on_gpu = choose_accelerator(section, num_gpus) == "gpu"
    if on_gpu and devices and devices > num_gpus:
        raise _refuse("devices", str(devices), f"at most the {num_gpus} GPUs of this machine, or `accelerator: cpu`")
    devices = devices or (min(num_gpus, section.batch_size) if on_gpu else 1)
    return Plan("here" if devices == 1 else "ddp", devices)


def _refuse(key: str, found: str, expected: str, todo: str = "Edit the file.") -> ParamsError:
    return ParamsError(f"params.yaml train.{key}", f"got {found}", expected, todo)


def describe_plan(plan: Plan) -> str:
    """Say where a training would run, in words."""
    if plan.kind == "ray":
        each = f"{plan.devices} a node, " if plan.devices else ""
        return f"in workers of Ray Train ({each}{plan.num_nodes} node{'s' if plan.num_nodes > 1 else ''})"
    number = (plan.devices or 1) * plan.num_nodes
    return "in one process" if number == 1 else f"in {number} processes"
