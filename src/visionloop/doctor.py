"""`visionloop doctor`: is this machine and this workspace fit, and what to do about each thing that is not."""

import importlib.metadata
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visionloop.bundle import describe_no_candidate, load_bundle
from visionloop.data.known_store import WAY_OUT, check_store
from visionloop.data.manifest import load_pin, load_version
from visionloop.errors import BundleError, VisionLoopError, describe_install, find_missing_extra, shorten
from visionloop.evaluation.resampling import describe_images
from visionloop.networks.processor import load_measured
from visionloop.parallel import count_cores
from visionloop.params import Params
from visionloop.pipeline import require_merged
from visionloop.promotion.ledger import read_champion, read_ledger, require_sound
from visionloop.promotion.promote import compare_alias, verify_in_store
from visionloop.promotion.restore import OTHER_WAYS, find_damage, find_lost
from visionloop.secrets import mask
from visionloop.settings import Settings
from visionloop.store.setup import describe_store
from visionloop.tracking import Tracking
from visionloop.workfolder import is_broken_off
from visionloop.workspace import Workspace

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "onnxruntime", "mlflow", "prefect", "dvc", "fastapi", "pillow")
LEAST_FREE_GB = 5
OF_THE_STORE = frozenset({"dataset", "ledger", "champion", "alias"})  # what another store would tell wrongly
NOT_CHECKED = "not checked: the store is not the one that this workspace knows"


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `todo` says what to do when it is not ok."""

    subject: str
    ok: bool
    found: str
    todo: str = ""


def examine(workspace: Workspace) -> list[Finding]:
    """Look at everything; a part that fails becomes a finding, not an end."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _check_python),
        ("packages", _check_packages),
        ("processor", lambda: _check_processor(workspace.params)),
        ("measured", lambda: _check_measured(workspace.settings)),
        ("disk", lambda: _check_disk(workspace.settings)),
        ("store", lambda: _check_store(workspace)),
        ("mlflow", lambda: _check_mlflow(workspace.tracking)),
        ("dataset", lambda: _check_dataset(workspace)),
        ("dvc", lambda: _check_dvc(workspace.settings)),
        ("candidate", lambda: _check_candidate(workspace.settings)),
        ("ledger", lambda: _check_ledger(workspace)),
        ("champion", lambda: _check_champion(workspace)),
        ("alias", lambda: _check_alias(workspace)),
    ]
    findings: list[Finding] = []
    for subject, check in checks:
        if subject in OF_THE_STORE and _is_other_store(findings):
            findings.append(Finding(subject, False, NOT_CHECKED, "First see to the store, above."))
            continue
        try:
            findings.append(check())
        except VisionLoopError as exc:
            todo = exc.todo or f"expected {exc.expected}"
            findings.append(Finding(subject, False, f"{exc.where}: {exc.found}", todo))
        except ImportError as exc:
            if (missing := find_missing_extra(exc)) is None:
                raise
            findings.append(Finding(subject, False, f"{missing.where} {missing.found}", missing.todo))
    return findings


def _is_other_store(findings: Sequence[Finding]) -> bool:
    return any(finding.subject == "store" and finding.todo == WAY_OUT for finding in findings)


def _check_python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", sys.version_info >= (3, 11), found, "Install Python 3.11 or 3.12.")


def _check_packages() -> Finding:
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            "packages", False, f"missing: {', '.join(missing)}", f"Run `{describe_install('train,serve,flows')}`."
        )
    return Finding("packages", True, ", ".join(versions))


def _check_processor(params: Params) -> Finding:
    from visionloop.training.precision import look_at_hardware
    from visionloop.training.ranks.launch import describe_launch, plan_launch
    from visionloop.training.ranks.world import World, count_gpus

    gpus = count_gpus()
    hardware, precision = look_at_hardware(params)
    device = f"{gpus} x {hardware.processor}" if hardware.accelerator == "gpu" else f"the CPU, {gpus or 'no'} GPUs"
    found = (
        f"{count_cores()} cores, {hardware.threads} torch threads; trains on {device}, in {precision}, "
        f"{describe_launch(plan_launch(params, World(), gpus))}"
    )
    ok = hardware.threads <= count_cores()
    return Finding("processor", ok, found, "Set OMP_NUM_THREADS to the number of cores.")


def _check_measured(settings: Settings) -> Finding:
    """Say what was measured in this workspace; nothing is measured here."""
    lines = [one.describe_all() for one in load_measured(settings.hidden_dir)]
    return Finding("measured", True, "; ".join(lines) or "nothing yet: `auto` measures when it first trains or embeds")


def _check_disk(settings: Settings) -> Finding:
    free_gb = shutil.disk_usage(settings.home).free / 1e9
    found = f"{free_gb:.0f} GB free at {settings.home}"
    return Finding("disk", free_gb >= LEAST_FREE_GB, found, f"Free some: {LEAST_FREE_GB} GB is little for a training.")


def _check_store(workspace: Workspace) -> Finding:
    """Write and read. First see whether it is the store of this workspace: a mistyped folder is not made.

    What a bucket lacks beyond that (versions, encryption, ...) is named: everything works without it.
    """
    check_store(workspace)
    store = workspace.store
    key, data = f"doctor/{secrets.token_hex(4)}", secrets.token_bytes(32)
    store.put(key, data)
    same = store.get(key) == data and not store.create(key, b"other")
    store.purge(key)
    lacking = "; ".join(f"{fact.subject} {fact.found}" for fact in describe_store(store) if not fact.ok)
    found = f"{store.url} can be written" + (f" (`visionloop store`: {lacking})" if lacking else "")
    return Finding("store", same, found, "It must read back what was written: check the store.")


def _check_mlflow(tracking: Tracking) -> Finding:
    tracking.get_champion()
    return Finding("mlflow", True, f"{mask(tracking.uri)} answers")


def _check_dataset(workspace: Workspace) -> Finding:
    pin = load_pin(workspace.settings.pin_path)
    version = load_version(workspace.store, pin.name, pin.version)
    found = f"{pin.name} version {pin.version}, {describe_images(pin.num_images, pin.num_images)}"
    ok = pin.name == workspace.name and version.digest == pin.digest
    return Finding("dataset", ok, found, f"The pin is not of {workspace.name} in this store: run `visionloop ingest`.")


def _check_dvc(settings: Settings) -> Finding:
    require_merged(settings)
    done = (settings.home / "dvc.lock").is_file()
    return Finding("dvc", True, "dvc.lock says which stages are done" if done else "no stage has run by dvc yet")


def _check_candidate(settings: Settings) -> Finding:
    """Check the candidate's files; none is no fault, but a training that was broken off is."""
    folder = settings.candidate_dir
    broken_off = is_broken_off(settings.work_dir("train"))
    if not folder.exists():
        return Finding("candidate", not broken_off, "none", describe_no_candidate(folder) * broken_off)
    try:
        found = f"bundle {load_bundle(folder).digest[:12]} is whole"
    except BundleError as exc:
        return Finding(
            "candidate", False, f"models/candidate: {exc.found}", "Run `visionloop train`: it makes it whole."
        )
    return Finding("candidate", True, found + "; a training was broken off, `visionloop train` goes on" * broken_off)


def _check_ledger(workspace: Workspace) -> Finding:
    ledger = read_ledger(workspace.store, workspace.name)
    require_sound(ledger, workspace.name)
    number = "1 entry" if len(ledger.entries) == 1 else f"{len(ledger.entries)} entries"
    order = ", each after the one before" if len(ledger.entries) > 1 else ""
    return Finding("ledger", True, f"{number} of {workspace.name}{order}")


def _check_champion(workspace: Workspace) -> Finding:
    """Fetch the champion's bundle as a server would: all its files, and its answers on this machine."""
    check_store(workspace)
    entry = read_champion(workspace.store, workspace.name)
    if entry is None:
        return Finding("champion", True, "none yet")
    if damaged := find_damage(workspace.store, entry.bundle):
        found = f"bundle {entry.bundle[:12]}: {shorten(damaged)} is missing or differs from its digest"
        if lost := find_lost(workspace, entry.bundle, damaged):
            return Finding("champion", False, f"{found}; no copy on this machine has {shorten(lost)}", OTHER_WAYS)
        return Finding("champion", False, found, "Run `visionloop doctor --fix`: it takes them from a copy here.")
    verify_in_store(workspace, entry.bundle)
    return Finding("champion", True, f"bundle {entry.bundle[:12]} is whole in the store and answers as it did")


def _check_alias(workspace: Workspace) -> Finding:
    entry = read_champion(workspace.store, workspace.name)
    if entry is None:
        return Finding("alias", True, "no champion to name yet")
    in_ledger, in_alias = compare_alias(workspace)
    found = f"ledger entry {entry.number}: model version {in_ledger}; MLflow's alias: {in_alias}"
    return Finding("alias", in_ledger == in_alias, found, "Run `visionloop doctor --fix`: it sets the alias again.")
