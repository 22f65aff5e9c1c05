"""Which MLflow run made a bundle: the note that training leaves in the workspace, beside the pure bundle."""

import json
from pathlib import Path

from visionloop.errors import BundleError
from visionloop.records import RunNote


def load_run_note(runs_dir: Path, bundle_digest: str) -> RunNote | None:
    """Read the note of a bundle; None when this workspace did not train it (restored by dvc, or cloned).

    Raises:
        BundleError: the note is damaged.
    """
    path = runs_dir / f"{bundle_digest}.json"
    try:
        return RunNote.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as exc:
        raise BundleError(f"run note {path.name}", "is damaged", "JSON of a run note", f"Delete {path}.") from exc
