"""The precision that a training computes in: as params.yaml says, or what is faster here, measured once.

What is timed is the real step: this network at this image size, forward, backward and the optimizer, on a few images.
Lightning and the networks are loaded only to time it: `visionloop doctor` tells the precision without them.
"""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from visionloop.data.shards import Prepared
from visionloop.networks import processor
from visionloop.networks.processor import BF16_FLAGS, MACHINE_FILE, Measured
from visionloop.params import WAYS_ON_EMBEDDINGS, Params, Train
from visionloop.training.job import Hardware
from visionloop.training.ranks.world import World, choose_accelerator, count_gpus, share
from visionloop.workspace import Workspace

CANDIDATES = ("fp32", "bf16")
# A batch norm needs two values; more images than a few take longer and say the same.
LEAST_IMAGES, MOST_IMAGES, MOST_PIXELS = 2, 16, 8 * 224 * 224


@dataclass(frozen=True)
class Precision:
    """The precision, why it is this one, and whether a person should hear it before training starts."""

    name: str
    why: str
    is_news: bool = False

    def describe(self) -> str:
        """Return it in words: `fp32 (the CPU has neither amx_bf16 nor avx512_bf16)`."""
        return f"{self.name} ({self.why})"


def choose_hardware(workspace: Workspace, prepared: Prepared, world: World) -> tuple[Hardware, list[str]]:
    """Resolve what `train` leaves open; return it with what a person should hear. Rank 0 measures, for all.

    Raises:
        ParamsError: a GPU is asked for where there is none.
        TrainingError: there is no such backbone, or it cannot take the image size.
    """
    section = workspace.params.train
    accelerator = choose_accelerator(workspace.params.compute, count_gpus())

    def choose() -> Precision:
        known = resolve_precision(section, accelerator)
        return known or _take_faster(measure_step(workspace, prepared, accelerator))

    precision = Precision(**share(world, lambda: asdict(choose())))
    hardware = make_hardware(accelerator, precision.name, world.size)
    remarks = []
    if world.size > 1:
        each = section.batch_size / world.size
        remarks.append(f"{world.size} processes train together, each on {each:g} images of a batch")
    if precision.is_news:
        remarks.append(f"computes in {precision.name}: {precision.why}")
    return hardware, remarks


def make_hardware(accelerator: str, precision: str, world_size: int = 1) -> Hardware:
    """Return what this process computes on."""
    name = torch.cuda.get_device_name() if accelerator == "gpu" else platform.machine()
    return Hardware(accelerator, precision, torch.get_num_threads(), name, world_size)


def look_at_hardware(params: Params) -> tuple[Hardware, str]:
    """Return what a training would compute on, and its precision in words. Measures nothing. Raises ParamsError."""
    accelerator = choose_accelerator(params.compute, count_gpus())
    known = resolve_precision(params.train, accelerator)
    words = known.describe() if known else "fp32 or bf16, whichever is measured to be faster (train.precision: auto)"
    return make_hardware(accelerator, known.name if known else "auto"), words


def resolve_precision(section: Train, accelerator: str) -> Precision | None:
    """Return the precision where nothing has to be measured for it; None where fp32 and bf16 are both candidates."""
    fast = has_bf16(accelerator)
    if section.precision != "auto":
        if section.precision == "bf16" and not fast:
            why = "as train.precision says, but slowly: there are no instructions for it here; `auto` would be faster"
            return Precision("bf16", why, is_news=True)
        return Precision(section.precision, "as train.precision says")
    if section.way in WAYS_ON_EMBEDDINGS:
        return Precision("fp32", f"train.way {section.way} computes little")
    if fast:
        return None
    none = f"the CPU has neither {' nor '.join(sorted(BF16_FLAGS))}"
    return Precision("fp32", none if accelerator == "cpu" else "the GPU has no bf16")


def has_bf16(accelerator: str) -> bool:
    """Say whether there are instructions for bf16; without them it is computed all the same, slowly."""
    if accelerator == "gpu":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return processor.has_bf16()


def _list_facts(accelerator: str) -> dict[str, Any]:
    """Return what the speed of a step depends on, besides the network."""
    name = torch.cuda.get_device_name() if accelerator == "gpu" else processor.read_cpu_name()
    here = {"accelerator": accelerator, "processor": name, "threads": torch.get_num_threads()}
    return {"step": "train", **here, "torch": str(torch.__version__)}


def measure_step(workspace: Workspace, prepared: Prepared, accelerator: str) -> Measured:
    """Return how fast a step is in each precision: as it was measured once, or measured now. Raises TrainingError."""
    section, units = workspace.params.train, 1 if prepared.task == "binary" else len(prepared.classes)
    network = {"backbone": section.backbone, "units": units, "image_size": list(prepared.size_hw)}
    facts = {**_list_facts(accelerator), **network}

    def measure() -> Measured:
        return Measured(facts, time_step(section, prepared, accelerator))

    return processor.measure_once(workspace.settings.hidden_dir, facts, CANDIDATES, measure)


def time_step(section: Train, prepared: Prepared, accelerator: str) -> dict[str, float]:
    """Return the images per second of a training step in each precision; a few seconds. Leaves torch's seed alone.

    The weights are random: a step takes no other time with them. Raises TrainingError.
    """
    from visionloop.networks.backbones import make_backbone
    from visionloop.networks.classifier import Classifier
    from visionloop.training.groups import make_optimizer
    from visionloop.training.loop import keep_memory
    from visionloop.training.losses import Objective, compute_loss

    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    (height, width), num_classes = prepared.size_hw, len(prepared.classes)
    num_images = max(LEAST_IMAGES, min(MOST_IMAGES, section.batch_size, MOST_PIXELS // (height * width)))
    if accelerator == "gpu":  # as the trainer does
        torch.set_float32_matmul_precision("high")
    with torch.random.fork_rng(), keep_memory():
        backbone, num_features = make_backbone(section.backbone, prepared.size_hw)
        backbone = backbone.to(memory_format=torch.channels_last)
        classifier: nn.Module = Classifier(backbone, num_features, num_classes, task=prepared.task).to(device).train()
        optimizer = make_optimizer(classifier, section, "all")  # type: ignore[arg-type]
        images_nhwc = torch.randint(0, 256, (num_images, height, width, 3), dtype=torch.uint8, device=device)
        targets_nu = torch.zeros(num_images, 1 if prepared.task == "binary" else num_classes, device=device)
        targets_nu[:, 0] = 1.0

        def make_step(precision: str) -> Callable[[], float]:
            def step() -> float:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = compute_loss(classifier(images_nhwc)[0], targets_nu, Objective(prepared.task))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                return float(loss.detach())  # a GPU is waited for

            return step

        return processor.time_in_turn({name: make_step(name) for name in CANDIDATES}, num_images)


def _take_faster(measured: Measured) -> Precision:
    figures = measured.describe().partition(": ")[2]
    return Precision(measured.choice, f"{figures} (measured once, kept in .visionloop/{MACHINE_FILE})", is_news=True)
