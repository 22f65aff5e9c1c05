"""`POST /predict/video`: what a video shows when. Its frames are answered in the network's idle time alone.

The upload goes to a file, not into memory; a process of its own decodes it (`video/player.py`), whose lists of
containers and codecs, and limits, are those of a source of videos.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from python_multipart.multipart import parse_options_header

from visionloop.data.encoded import estimate_bytes
from visionloop.errors import SourceError
from visionloop.predictor import Outputs, join_outputs
from visionloop.serving.batcher import Batcher
from visionloop.serving.body import NO_BOUNDARY, BodyReader, FormReader, Limits, RequestError, make_form_error
from visionloop.serving.envelope import name_request
from visionloop.serving.schemas import ERRORS, REFUSED, VIDEO_BODY, ErrorAnswer, ToRequest
from visionloop.serving.service import Deadline, Places, Service, name_model
from visionloop.serving.swap import ServedModel
from visionloop.video.player import End, Frame, Player, Start, check_installed
from visionloop.video.sample import DecodeJob
from visionloop.video.timeline import Timeline, describe_timeline, make_timeline

VIDEO = "/predict/video"
AT_ONCE, LIMIT_S, BODY_S = 2, 300.0, 300.0
MAX_FRAMES = 1200
LEAST_EVERY_S, MOST_EVERY_S, MOST_SMOOTH_S = 0.04, 60.0, 60.0
NICE = 10
MAX_PARTS = 64
HEAD_BYTES = 4096  # enough to tell an image
STATUS_OF = {"not_a_video": 415, "no_video": 415}  # all other ends of a video: 422
VIDEO_ERRORS = {**ERRORS, 415: {"model": ErrorAnswer, "description": "No video that is read, or no reader of videos"}}


class VideoSegment(BaseModel):
    """A part of the video with one answer. `labels` is null unless the model's task is multilabel."""

    start_s: float
    end_s: float
    prediction: str
    labels: list[str] | None
    confidence: float = Field(ge=0, le=1)
    abstained: str | None
    num_frames: int


class VideoTiming(BaseModel):
    """How long it took: to answer after the upload, and of that in the network."""

    answer_ms: float
    network_ms: float


class VideoAnswer(ToRequest):
    """What the video shows for the longest time, and its segments, without gaps between them.

    `confidence` is the mean probability of an answer over its time. `abstained` says why the model does not know;
    of the whole: for most of the time. `shares` are the parts of the time in which a label is seen. `notes` say what
    is to be known of the reading: that the video is damaged, or was longer than is read.
    """

    prediction: str
    labels: list[str] | None
    confidence: float = Field(ge=0, le=1)
    abstained: str | None
    shares: dict[str, float]
    segments: list[VideoSegment]
    duration_s: float
    num_frames: int
    every_s: float
    smooth_s: float
    notes: list[str]
    timing: VideoTiming


@dataclass
class _Seen:
    """What was read of a video so far."""

    times_s: list[float] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    end: End = field(default_factory=lambda: End(None))
    network_s: float = 0.0


def add_video(app: FastAPI, service: Service) -> None:
    """Add the route."""
    batcher, limits = service.batcher, service.inbox.limits
    places = Places(batcher, "videos", AT_ONCE)
    threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="video")  # begun when they are first needed

    @app.post(
        VIDEO,
        response_model=VideoAnswer,
        responses={**REFUSED, **VIDEO_ERRORS},
        openapi_extra={"requestBody": VIDEO_BODY},
        summary="Classify a video over time",
    )
    async def predict_video(
        request: Request,
        every_s: Annotated[
            float, Query(ge=LEAST_EVERY_S, le=MOST_EVERY_S, description="Seconds from one frame to the next")
        ] = 0.5,
        smooth_s: Annotated[
            float, Query(ge=0, le=MOST_SMOOTH_S, description="A change for a shorter time is taken for a flicker")
        ] = 1.0,
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """Send the video as the body, or as the one file of a form: MP4, MOV, WebM, MKV, AVI, MPEG, and some more.

        The bytes decide what it is. Frames count as images for the rate of your key; they wait while others want
        predictions. Nothing of a video is written into the prediction log.
        """
        _require_reader()
        with places.take(), contextlib.ExitStack() as stack:
            file = stack.enter_context(_make_file())
            make_reader = partial(_make_reader, request.headers, file)
            async with service.inbox.receive_by(
                request, make_reader, max_bytes=limits.max_video_bytes, timeout_s=BODY_S, is_held=False
            ):
                model = service.note_model(request)
                started_at = time.perf_counter()
                job = _make_job(file.name, every_s, limits, model)
                seen = _Seen()
                try:
                    work = _watch(batcher, model, job, threads, seen)
                    await service.finish(request, work, service.read_limit(x_deadline_ms, LIMIT_S))
                finally:  # also what was answered for a client that left, or was late
                    request.state.access.charge(request, max(1, len(seen.times_s)))
            _require_frames(seen, file)
        timeline = await asyncio.to_thread(_make_timeline, seen, model, every_s, smooth_s)
        notes = [*seen.end.told, *([seen.end.text] if seen.end.text else [])]
        described = describe_timeline(timeline, len(seen.times_s), notes, every_s=every_s, smooth_s=smooth_s)
        timing = {"answer_ms": _to_ms(time.perf_counter() - started_at), "network_ms": _to_ms(seen.network_s)}
        return JSONResponse({**described, "timing": timing, "model": name_model(model), **name_request(request)})


def _to_ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _require_reader() -> None:
    try:
        check_installed("server")
    except SourceError as exc:
        found = "this server reads no videos"
        raise RequestError(
            found, "av", "Install visionloop with the extra `ingest` there.", status=415, reason_code="no_reader"
        ) from exc


def _require_frames(seen: _Seen, file: IO[bytes]) -> None:
    if not seen.times_s:
        code = seen.end.code or "no_video"
        file.seek(0)
        if code == "not_a_video" and estimate_bytes(file.read(HEAD_BYTES)):
            raise RequestError("it is an image", "a video", "Send it to /predict.", status=415, reason_code=code)
        found = f"its video {seen.end.text or 'has no frame'}"
        raise RequestError(found, "a whole video", status=STATUS_OF.get(code, 422), reason_code=code)


def _make_job(path: str, every_s: float, limits: Limits, model: ServedModel) -> DecodeJob:
    max_pixels = model.predictor.card.max_pixels
    return DecodeJob(
        every_s=every_s,
        scene=None,
        spans=[(0.0, None)],
        max_frames=MAX_FRAMES,
        max_s=limits.max_video_s,
        max_pixels=min(limits.max_pixels or max_pixels, max_pixels),
        file=path,
    )


async def _watch(
    batcher: Batcher, model: ServedModel, job: DecodeJob, threads: ThreadPoolExecutor, seen: _Seen
) -> None:
    """Ask the model about each frame, and note it. If the caller is cancelled, decoding ends before this does."""
    loop = asyncio.get_running_loop()
    waiting: list[Any] = []
    with Player(NICE) as player:
        answers = player.play(job)
        while True:
            reading: asyncio.Future[Start | Frame | End] = loop.run_in_executor(
                threads, partial(next, answers, seen.end)
            )
            try:
                answer = await asyncio.shield(reading)
            except asyncio.CancelledError:
                player.interrupt()
                await asyncio.wait((reading,))
                raise
            if isinstance(answer, Frame):
                waiting.append(await batcher.decode(model, answer.jpeg))
                seen.times_s.append(answer.t_ms / 1000)
            is_over = isinstance(answer, End)
            if waiting and (is_over or len(waiting) >= batcher.spare_size):
                await _ask(batcher, model, waiting, seen)
                waiting = []
            if isinstance(answer, End):
                seen.end = answer
                return


async def _ask(batcher: Batcher, model: ServedModel, waiting: list[Any], seen: _Seen) -> None:
    def run() -> tuple[Outputs, float]:
        started_at = time.perf_counter()
        return model.predictor.run(np.stack(waiting)), time.perf_counter() - started_at

    outputs, network_s = await batcher.run_spare(run, len(waiting))
    seen.outputs.append(outputs)
    seen.network_s += network_s


def _make_timeline(seen: _Seen, model: ServedModel, every_s: float, smooth_s: float) -> Timeline:
    outputs = join_outputs(seen.outputs)
    doubts = [answer.abstained for answer in model.predictor.answer(outputs)]
    card = model.predictor.card
    end_s = seen.end.end_s
    return make_timeline(seen.times_s, outputs.probs_nk, doubts, card, every_s=every_s, smooth_s=smooth_s, end_s=end_s)


class _RawVideo:
    """Writes the whole body into a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def feed(self, chunk: bytes) -> None:
        _write(self._file, chunk)

    def finish(self) -> None:
        if not self._file.tell():
            raise RequestError("its body is empty", "a video", "Send a file or a form.", reason_code="empty")
        try:
            self._file.flush()
        except OSError as exc:
            raise _make_no_room(self._file) from exc


class _VideoForm(FormReader):
    """Writes the one file of a form into a file."""

    def __init__(self, boundary: bytes, file: IO[bytes]) -> None:
        super().__init__(boundary, MAX_PARTS)
        self._file, self._num_files = file, 0

    def _on_part_begin(self) -> None:
        super()._on_part_begin()
        self._is_video: bool | None = None

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_video is None:
            self._is_video = self.read_file_name() is not None
            self._num_files += self._is_video
            if self._num_files > 1:
                raise RequestError("its form has several files", "one video", reason_code="one_video")
        if self._is_video:
            _write(self._file, data[start:end])

    def _on_part_end(self) -> None:
        """The part is in the file already."""

    def finish(self) -> list[Any]:
        self.require_end()
        _RawVideo(self._file).finish()
        return []


def _make_reader(headers: Mapping[str, str], file: IO[bytes]) -> BodyReader[Any]:
    kind, options = parse_options_header(headers.get("content-type"))
    if not kind.startswith(b"multipart/"):
        return _RawVideo(file)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise make_form_error("has no form in it that can be read", NO_BOUNDARY)
    return _VideoForm(options[b"boundary"], file)


def _make_file() -> IO[bytes]:
    try:
        return tempfile.NamedTemporaryFile(prefix="visionloop-video-")
    except OSError as exc:
        raise _make_no_room() from exc


def _write(file: IO[bytes], chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as exc:
        raise _make_no_room(file) from exc


def _make_no_room(file: IO[bytes] | None = None) -> RequestError:
    """Close a file that the disk has no room for: what is left in its buffer would fail once more, later."""
    with contextlib.suppress(OSError):
        if file:
            file.close()
    found = "the server has no room for a video now"
    return RequestError(found, todo="Try again later.", status=503, reason_code="no_room")
