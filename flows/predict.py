"""Answers for new files, and for what cameras show, with the champion and on a schedule: each file once."""

import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Cancelled, Completed, State

import steps
import told
from visionloop.engines import make_opener
from visionloop.errors import BusyError, ParamsError, SourceError
from visionloop.ingest.paths.listing import is_video_name
from visionloop.predict.chunks import Cluster, predict_in_chunks
from visionloop.predict.connection import WatchPlan
from visionloop.predict.files import Sampling, find_new
from visionloop.predict.lines import Outbox, open_lines, write_line
from visionloop.predict.several import follow_all, name_streams, watch_all
from visionloop.predict.tables import Table
from visionloop.predictor import Predictor
from visionloop.promotion.models import load_approved_model
from visionloop.video.player import check_installed
from visionloop.words import make_log_progress
from visionloop.workspace import Workspace, open_workspace


@flow(name="predict", **told.HOOKS)
def predict(workspace: str) -> State[Any]:
    """Answer for the files of `predict.paths` that no table in `predict.out` has, and watch `predict.streams` a while.

    Completed as Answered or NothingNew. A run that was stopped is taken up by the next one. Skipped: another one writes
    the same table now.
    """
    opened = open_workspace(Path(workspace))
    try:
        lines = steps.run_step("predict", lambda: answer_new(opened))
    except BusyError as exc:
        told.keep_end("predict", opened.settings.home, "skipped", str(exc))
        return Cancelled(name="Skipped", message=str(exc))
    told.keep_page("predict", opened, "answers", lines)
    return Completed(name="Answered" if len(lines) > 1 else "NothingNew", message=lines[0])


def answer_new(workspace: Workspace) -> list[str]:
    """Answer for the new files, and watch the streams; return what is told: one line where there was nothing to do.

    Raises:
        ParamsError: no path and no stream is named. PromotionError: there is no champion.
        VisionLoopError: no stream was watched. As `predict_in_chunks`.
    """
    section = workspace.params.predict
    if not section.paths and not section.streams:
        expected = "images, videos, folders, globs or streams"
        raise ParamsError("params.yaml predict.paths", "names none", expected, "Edit the file.")
    folder = workspace.settings.home / Path(section.out).expanduser()
    started = datetime.now(UTC)
    files, path = _find_new(workspace, folder)
    if not files and not section.streams:
        return [f"no new file in {', '.join(section.paths)}"]
    folder.mkdir(parents=True, exist_ok=True)
    opened = load_approved_model(None, workspace, make_opener(workspace, steps.say))
    lines = _answer_files(workspace, opened.predictor, files, path, started) if files else []
    if section.streams:
        lines += watch_streams(workspace, opened.predictor, folder / "streams.jsonl")
    lines.append(f"by bundle {opened.predictor.digest[:12]}")
    for line in lines:
        steps.say(line)
    return lines


def _find_new(workspace: Workspace, folder: Path) -> tuple[list[Path], Path]:
    """Return what is new, and the next table. Videos stay new where nothing reads them: a row would be their answer."""
    home, paths = workspace.settings.home, workspace.params.predict.paths
    files, table = find_new([str(home / Path(one).expanduser()) for one in paths], folder)
    videos = [one for one in files if is_video_name(one.name)]
    try:
        check_installed("predict.paths") if videos else None
    except SourceError as exc:
        waiting = "1 video waits" if len(videos) == 1 else f"{len(videos):,} videos wait"
        steps.say(f"{waiting}: {exc.found}. {exc.todo}")
        return [one for one in files if one not in {*videos}], table
    return files, table


def _answer_files(
    workspace: Workspace, predictor: Predictor, files: list[Path], path: Path, started: datetime
) -> list[str]:
    section, table = workspace.params.predict, Table(path, "parquet")
    with predict_in_chunks(
        predictor,
        files,
        table,
        workspace.settings.hidden_dir / "predict",
        sampling=Sampling(section.every_s, section.smooth_s),
        cluster=Cluster.plan(workspace),
        on_progress=make_log_progress("answered", "images", steps.say),
        tell=steps.say,
    ) as chunks:
        if path.exists():
            raise BusyError(str(path), "was written just now by another run", "a free name", "Run it again.")
        unusable = sum(one.prediction is None for one in chunks.read())
        table.write(chunks.read(), predictor)
        os.utime(path, (started.timestamp(), started.timestamp()))
    return [f"{table.describe(len(files), unusable)} in {path}"]


def watch_streams(workspace: Workspace, predictor: Predictor, out: Path) -> list[str]:
    """Watch all streams at once for `predict.seconds`, append their lines to a file, and return what each came to.

    Raises:
        VisionLoopError: no stream shows anything; the first one's reason. DiskError: a line cannot be written.
    """
    section, hidden_dir = workspace.params.predict, workspace.settings.hidden_dir
    named, sampling = name_streams(section.streams), Sampling(section.every_s, section.smooth_s)
    several = len(named) > 1
    plans = [
        WatchPlan(
            path, os.environ, sampling, section.seconds, name=name, is_one_of_several=several, hosts=section.hosts
        )
        for name, path in named
    ]
    webhook = section.webhook
    open_box = partial(Outbox.open, hidden_dir, webhook=webhook, env=os.environ) if webhook else None
    streams = follow_all(plans, predictor, workspace.name, open_box)
    with open_lines(out) as file:
        for found in watch_all(streams):
            if found:
                write_line(file, found[1])
    return [one.describe() for one in streams]
