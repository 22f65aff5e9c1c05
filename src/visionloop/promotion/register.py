"""The stage `register`: a passed candidate goes into the store, and MLflow's registry mirrors it. Promotes nothing."""

from visionloop.bundle import upload_bundle
from visionloop.evaluation.run_note import load_run_note
from visionloop.params import Params
from visionloop.predictor import Predictor
from visionloop.promotion.decisions import require_passed
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.tracking import Tracking


def register(settings: Settings, params: Params, store: ObjectStore, tracking: Tracking) -> str:
    """Copy models/candidate to the store, register it with MLflow, and return the model version.

    Done again, it finishes what was cut off and returns the same version.

    Raises:
        NotPromoted: the gate has not passed this candidate.
        BundleError: the candidate is damaged, or answers differently here.
        TrackingError: MLflow cannot be reached; the store's copy stays, and a second run goes on from there.
    """
    bundle = Predictor.load(settings.candidate_dir).bundle
    decision = require_passed(store, params.name, bundle.digest)
    upload_bundle(store, bundle)
    note = load_run_note(settings.runs_dir, bundle.digest)
    tags = {
        "visionloop.decision": str(decision.number),
        "visionloop.dataset": str(decision.dataset["digest"]),
        "visionloop.dataset_version": str(decision.dataset["version"]),
    }
    return tracking.register_onnx(note.run_id if note else None, bundle.folder / "model.onnx", bundle.digest, tags)
