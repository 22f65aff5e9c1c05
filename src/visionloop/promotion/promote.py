"""The stages `register` and `promote`, and the rollback. The ledger is written first, then MLflow's alias.

A server follows the ledger, so a promotion is done once its entry is written, with or without MLflow.
"""

import tempfile
from pathlib import Path

from visionloop.bundle import DIGESTS, download_bundle, load_bundle, load_run_note, upload_bundle
from visionloop.data.known_store import check_store, remember_entry
from visionloop.data.manifest import is_experiment, load_version
from visionloop.errors import NotPromoted, PromotionError, TrackingError, shorten
from visionloop.evaluation.runtimes import load_approved
from visionloop.predictor import FP32, Predictor
from visionloop.promotion.ledger import (
    ROLLED_BACK,
    append_entry,
    describe_entry,
    describe_rollback,
    find_rolled_back,
    is_bound,
    latest_decision,
    read_champion,
    read_history,
    require_bound,
    require_passed,
)
from visionloop.records import Decision, LedgerEntry
from visionloop.store import ObjectStore
from visionloop.store.lease import Lease
from visionloop.tracking import DIGEST_TAG
from visionloop.workspace import Workspace

ALIAS_ROUNDS = 3


def register(workspace: Workspace) -> str:
    """Copy models/candidate to the store, register it with MLflow, and return the model version.

    A second run finishes what an interrupted one began, and returns the same version.

    Raises:
        NotPromoted: the gate has not passed this candidate.
        BundleError: the candidate is damaged, or answers differently here.
        TrackingError: MLflow cannot be reached; the store's copy stays, and a second run goes on from there.
    """
    check_store(workspace)
    bundle = Predictor.load(workspace.settings.candidate_dir).bundle
    decision = require_passed(workspace.store, workspace.name, bundle.digest, again=True)
    upload_bundle(workspace.store, bundle)
    note = load_run_note(workspace.settings.runs_dir, bundle.digest)
    tags = {
        "visionloop.decision": str(decision.number),
        "visionloop.dataset": str(decision.dataset["digest"]),
        "visionloop.dataset_version": str(decision.dataset["version"]),
    }
    return workspace.tracking.register_onnx(
        note.run_id if note else None, bundle.folder / "model.onnx", bundle.digest, tags
    )


def promote(
    workspace: Workspace, *, by: str, why: str, now: str, again: bool = False, lease: Lease | None = None
) -> LedgerEntry:
    """Make the registered, passed models/candidate the champion; return its ledger entry.

    If it is the champion already, corrects MLflow's alias where it differs and returns the existing entry; a new one
    where a later evaluation approves other engines. `again` lets a model pass that was rolled back from, if nothing
    else holds it back, and registers it where it is not. `lease`: of the retrain that promotes.

    Raises:
        NotPromoted: the gate has not passed this candidate, or it was rolled back from.
        PromotionError: it is not registered, the champion moved since the decision, or it is of an experiment.
        LeaseLost: another retrain has taken over from this one; nothing has changed.
        DatasetError: the store does not have the dataset version of the decision.
        BundleError: the store's copy is damaged, or answers differently here.
        TrackingError: MLflow cannot be reached. If the ledger has moved by then, a second run sets the alias.
    """
    check_store(workspace)
    store = workspace.store
    name, digest = workspace.name, load_bundle(workspace.settings.candidate_dir).digest
    champion = read_champion(store, name)
    if champion and champion.bundle == digest:
        champion = _approve_engines(workspace, champion, by=by, now=now, lease=lease)
        mirror_alias(workspace)
        return champion
    if not again:
        _refuse_taken_down(store, name, digest, champion)
    decision = require_passed(store, name, digest, again=again)
    require_bound(decision, champion, again=again)
    _refuse_experiment(store, name, decision, digest)
    version = workspace.tracking.find_version(digest) if store.exists(f"bundles/{digest}/{DIGESTS}") else None
    if version is None and again:
        version = register(workspace)
    if version is None:
        raise PromotionError(
            f"candidate {digest[:12]}", "is not registered", "a model version", "Run `visionloop register`."
        )
    verify_in_store(workspace, digest)
    note = load_run_note(workspace.settings.runs_dir, digest)
    if lease:
        lease.check()
    entry = append_entry(
        store,
        name,
        champion,
        action="promote",
        bundle=digest,
        model_version=version,
        decision=decision.number,
        dataset=decision.dataset,
        run_id=note.run_id if note else decision.run_id or workspace.tracking.find_tagged_run(DIGEST_TAG, digest),
        by=by,
        why=why,
        at=now,
        runtimes=load_approved(workspace.settings.reports_dir, digest) or (),
    )
    remember_entry(workspace)
    mirror_alias(workspace)
    return entry


def explain_engines(workspace: Workspace, entry: LedgerEntry) -> str | None:
    """Say why a champion is served in fp32 though its card approves of more; None: it is not so, or it was judged."""
    if entry.runtimes or load_approved(workspace.settings.reports_dir, entry.bundle) is not None:
        return None
    runtimes = load_bundle(workspace.settings.candidate_dir, expected_digest=entry.bundle).card.runtimes
    if not (others := [name for name in runtimes if name != FP32]):
        return None
    return (
        f"it is served in {FP32}: no evaluation of it is here that approves {shorten(others)}. "
        "Run `visionloop evaluate`, then `visionloop promote` again."
    )


def rollback(workspace: Workspace, *, to: int | None, by: str, why: str, now: str) -> LedgerEntry:
    """Make an earlier champion the champion again: the previous one, or that of ledger entry `to`.

    Two rollbacks in a row go back by two: a model that was rolled back from is never taken again. The ledger is written
    even while MLflow cannot be reached.

    Raises:
        PromotionError: there is no earlier champion, or another process has changed the champion meanwhile.
        BundleError: the earlier bundle is damaged, or answers differently here; nothing has changed then.
        TrackingError: the ledger entry is written, the alias is not; do not roll back again.
    """
    check_store(workspace)
    name = workspace.name
    history = read_history(workspace.store, name)
    target = _find_target(name, history, to)
    verify_in_store(workspace, target.bundle)
    entry = append_entry(
        workspace.store,
        name,
        history[-1],
        action="rollback",
        bundle=target.bundle,
        model_version=target.model_version,
        decision=target.decision,
        dataset=target.dataset,
        run_id=target.run_id,
        by=by,
        why=why,
        at=now,
        runtimes=target.runtimes,
    )
    remember_entry(workspace)
    try:
        mirror_alias(workspace)
    except TrackingError as exc:
        raise TrackingError(
            exc.where,
            f"{exc.found}; rolled back all the same: ledger entry {entry.number} stands, but the alias did not follow",
            exc.expected,
            "Do not roll back again: run `visionloop doctor --fix` when MLflow is back.",
        ) from exc
    return entry


def mirror_alias(workspace: Workspace) -> str | None:
    """Point MLflow's alias at the ledger's champion, read it back, and return the model version (None: no champion).

    A champion that this MLflow does not know is registered again from the store.

    Raises:
        PromotionError: something else keeps changing the alias. TrackingError: MLflow cannot be reached.
    """
    tracking, name = workspace.tracking, workspace.name
    for _ in range(ALIAS_ROUNDS):
        champion = read_champion(workspace.store, name)
        if champion is None:
            return None
        version = tracking.find_version(champion.bundle) or _register_again(workspace, champion)
        if tracking.get_champion() != version:
            tracking.set_champion(version)
        # Another promotion may have happened meanwhile. Then the loop sets the alias to the newer champion.
        if tracking.get_champion() == version and read_champion(workspace.store, name) == champion:
            return version
    raise PromotionError(
        f"MLflow model {name}",
        "its alias `champion` keeps moving",
        f"version {version}, as the ledger says",
        "See who else sets it, then run `visionloop doctor --fix`.",
    )


def compare_alias(workspace: Workspace) -> tuple[str | None, str | None]:
    """Return the model version of the ledger's champion and the version that the alias names. They should be equal.

    Raises:
        PromotionError: the ledger is damaged. TrackingError: MLflow cannot be reached.
    """
    champion = read_champion(workspace.store, workspace.name)
    version = (workspace.tracking.find_version(champion.bundle) or champion.model_version) if champion else None
    return version, workspace.tracking.get_champion()


def _approve_engines(
    workspace: Workspace, champion: LedgerEntry, *, by: str, now: str, lease: Lease | None
) -> LedgerEntry:
    """Write an entry of the same champion if the evaluation that lies here approves other engines; return the last."""
    approved = load_approved(workspace.settings.reports_dir, champion.bundle)
    if approved is None or set(approved) == set(champion.runtimes):
        return champion
    why = f"evaluated again, approved: {', '.join(approved) or 'no other engine'}"
    facts = {**champion.to_json(), "action": "promote", "by": by, "why": why, "at": now, "runtimes": approved}
    for name in ("name", "number", "previous"):
        del facts[name]
    if lease:
        lease.check()
    entry = append_entry(workspace.store, workspace.name, champion, **facts)
    remember_entry(workspace)
    return entry


def _refuse_taken_down(store: ObjectStore, name: str, digest: str, champion: LedgerEntry | None) -> None:
    """Raise NotPromoted for a bundle that was rolled back from; `--again` is advised only where it can help."""
    taken_down = find_rolled_back(read_history(store, name), digest)
    if taken_down is None:
        return
    decision = latest_decision(store, name, candidate=digest)
    rules = decision.rules if decision and is_bound(decision, champion) else ()
    held = [rule.rule for rule in rules if rule.holds_back and rule.rule != ROLLED_BACK]
    todo = "If it should serve all the same: `visionloop gate`, then `visionloop promote --again --why ...`."
    if decision and held:
        todo = f"`--again` would not help: decision {decision.number} also holds it back by {shorten(held)}."
    raise NotPromoted(f"candidate {digest[:12]}", f"was {describe_rollback(taken_down)}", "another model", todo)


def _refuse_experiment(store: ObjectStore, name: str, decision: Decision, digest: str) -> None:
    number = decision.dataset["version"]
    if is_experiment(load_version(store, name, number)):
        raise PromotionError(
            f"candidate {digest[:12]}",
            f"comes from an experiment: dataset {name} version {number} is split at random",
            "a dataset split by `method: hash`",
            "Choose another `name` with ingest.split.method: hash in params.yaml, and ingest and train again.",
        )


def _find_target(name: str, history: list[LedgerEntry], to: int | None) -> LedgerEntry:
    """Return the entry to go back to: entry `to`, or the champion that the current one replaced when promoted."""
    where = f"ledger {name}"
    if not history:
        raise PromotionError(where, "is empty", "an earlier champion to go back to", "Promote a model first.")
    current = history[-1]
    if to is not None:
        found = next((e for e in history if e.number == to), None)
        if found is None:
            numbers = [str(e.number) for e in history if e.bundle != current.bundle]
            expected = f"one of {shorten(numbers)}" if numbers else "an earlier champion"
            raise PromotionError(where, f"has no entry {to}", expected, "See `visionloop history`.")
        if found.bundle == current.bundle:
            raise PromotionError(
                where, f"entry {to} is the champion already", "another one", "See `visionloop history`."
            )
        return found
    promoted = [e for e in history if e.bundle == current.bundle and e.action == "promote" and e.previous != e.bundle]
    origin = promoted[-1] if promoted else current
    earlier = [e for e in history if e.bundle == origin.previous and e.number < origin.number]
    if not earlier:
        raise PromotionError(
            where,
            f"has no champion before {describe_entry(current)}",
            "an earlier one",
            "Pass --to N, see `visionloop history`.",
        )
    return earlier[-1]


def verify_in_store(workspace: Workspace, digest: str) -> None:
    """Download a bundle without this machine's cache, as a server would; check its digests and golden answers."""
    workspace.settings.hidden_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=workspace.settings.hidden_dir) as folder:
        Predictor.fetch(workspace.store, digest, Path(folder))


def _register_again(workspace: Workspace, champion: LedgerEntry) -> str:
    bundle = download_bundle(workspace.store, champion.bundle, workspace.settings.hidden_dir / "bundles")
    tags = {"visionloop.decision": str(champion.decision), "visionloop.dataset": str(champion.dataset.get("digest"))}
    return workspace.tracking.register_onnx(champion.run_id, bundle.folder / "model.onnx", champion.bundle, tags)
