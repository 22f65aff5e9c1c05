"""Answers for new images with the champion, on a schedule: each image once, into a table for each run."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Cancelled, Completed, State

import steps
import told
from visionloop.engines import make_opener
from visionloop.errors import BusyError, ParamsError
from visionloop.predict.chunks import predict_in_chunks
from visionloop.predict.files import find_new
from visionloop.predict.tables import Table
from visionloop.promotion.models import load_approved_model
from visionloop.words import make_log_progress
from visionloop.workspace import Workspace, open_workspace


@flow(name="predict", **told.HOOKS)
def predict(workspace: str) -> State[Any]:
    """Answer for the images of `predict.paths` that no table in `predict.out` has; completed as Answered or NothingNew.

    A run that was stopped is taken up by the next one. Skipped: another one writes the same table now.
    """
    opened = open_workspace(Path(workspace))
    try:
        lines = steps.run_step("predict", lambda: answer_new(opened))
    except BusyError as exc:
        told.keep_end("predict", opened.settings.home, "skipped", str(exc))
        return Cancelled(name="Skipped", message=str(exc))
    told.keep_page("predict", opened, "answers for new images", lines)
    return Completed(name="Answered" if len(lines) > 1 else "NothingNew", message=lines[0])


def answer_new(workspace: Workspace) -> list[str]:
    """Answer for the new images, and return what is told: one line where there was none. Raises as `predict_in_chunks`.

    Raises:
        ParamsError: no path is named.
        PromotionError: there is no champion.
    """
    home, section = workspace.settings.home, workspace.params.predict
    if not section.paths:
        raise ParamsError("params.yaml predict.paths", "names none", "images, folders or globs", "Edit the file.")
    started, folder = datetime.now(UTC), home / Path(section.out).expanduser()
    files, path = find_new([str(home / Path(one).expanduser()) for one in section.paths], folder)
    if not files:
        return [f"no new image in {', '.join(section.paths)}"]
    folder.mkdir(parents=True, exist_ok=True)
    opened = load_approved_model(None, workspace, make_opener(workspace, steps.say))
    table = Table(path, "parquet")
    progress = make_log_progress("answered", "images", steps.say)
    work = workspace.settings.hidden_dir / "predict"
    with predict_in_chunks(opened.predictor, files, table, work, on_progress=progress, tell=steps.say) as chunks:
        if path.exists():
            raise BusyError(str(path), "was written just now by another run", "a free name", "Run it again.")
        unusable = sum(one.prediction is None for one in chunks.read())
        table.write(chunks.read(), opened.predictor)
        os.utime(path, (started.timestamp(), started.timestamp()))
    lines = [f"{table.describe(len(files), unusable)} in {path}", f"by bundle {opened.predictor.digest[:12]}"]
    for line in lines:
        steps.say(line)
    return lines
