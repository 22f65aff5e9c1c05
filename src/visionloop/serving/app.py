"""The HTTP interface of a model, put together. Builds no model, reads no settings, opens no socket.

The routes for answers are in `predict.py`, `inference.py`, `similar.py`, `explain.py`, `video.py`, `feedback.py` and
`page/`. Here are those for operators: health, model, figures, and the look at the ledger that one can ask for.

A wrong request gets a 4xx. A full server, or one without a model, answers 503. Only our own bugs give a 500.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from visionloop import __version__
from visionloop.serving.access import Access
from visionloop.serving.aside import Aside
from visionloop.serving.batcher import Batcher
from visionloop.serving.body import Inbox, Limits, RequestError
from visionloop.serving.envelope import ERROR_KINDS, Envelope, answer_error, check_options
from visionloop.serving.explain import add_explain
from visionloop.serving.feedback import FeedbackBook, add_feedback
from visionloop.serving.inference import INFER, add_inference
from visionloop.serving.log import Noted, PredictionLog
from visionloop.serving.metrics import Meters
from visionloop.serving.page import add_page
from visionloop.serving.predict import PREDICT, add_predict
from visionloop.serving.schemas import (
    ERRORS,
    NOT_FOLLOWING,
    REFUSED,
    ModelAnswer,
    ReadyAnswer,
    ReloadAnswer,
    complete_document,
)
from visionloop.serving.service import Service, name_model
from visionloop.serving.shadow import Shadow
from visionloop.serving.similar import add_similar
from visionloop.serving.swap import ModelSlot
from visionloop.serving.video import add_video
from visionloop.store import ObjectStore

LOOK_S = 30.0


def make_app(
    slot: ModelSlot,
    limits: Limits | None = None,
    access: Access | None = None,
    look_now: Callable[[], None] | None = None,
    *,
    log: PredictionLog | None = None,
    book: FeedbackBook | None = None,
    store: ObjectStore | None = None,
    shadow: Shadow | None = None,
) -> FastAPI:
    """Build the application. The model in `slot` may change, or be missing, at any time.

    `look_now` looks at the ledger, and may take as long as that takes; None: the server follows none. With a `log`
    answers are written down; a `book` takes feedback on them. `store` has the pictures of what /similar names.
    A `shadow` answers some of them too, for itself.
    """
    limits, access = limits or Limits(), access or Access()
    meters = Meters(slot, lambda: batcher.depth, lambda: access.has_problem, log=log, book=book, shadow=shadow)
    batcher = Batcher(
        max_batch=limits.max_batch,
        max_queue=limits.max_queue,
        max_pixels=limits.max_pixels,
        cache_bytes=limits.cache_bytes,
        decoders=lambda: slot.current.decoders if slot.current else 0,
        on_batch=meters.count_batch,
        measure=log.measure if log else lambda image_hwc: None,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        if shadow:
            shadow.start(batcher)
        yield
        if shadow:
            await shadow.stop()
        await batcher.stop()

    app = FastAPI(title="visionloop", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.router.dependencies.append(Depends(check_options))
    app.add_middleware(Envelope, meters=meters, counted=f"{PREDICT}|{INFER}", access=access)
    for kind in ERROR_KINDS:
        app.add_exception_handler(kind, answer_error)
    service = Service(slot, Inbox(limits), batcher)
    note = partial(_note, log, shadow) if log else None
    add_predict(app, service, meters, note)
    add_feedback(app, service.require_model, service.inbox, book)
    add_inference(app, service, meters, note)
    add_similar(app, service, store)
    add_explain(app, service)
    add_video(app, service)
    _add_reload(app, service, look_now)
    _add_state(app, service, meters)
    add_page(app, keeps_images=log is not None and log.keeper is not None)
    complete_document(app)
    return app


def _note(log: PredictionLog, shadow: Shadow | None, noted: Noted) -> None:
    log.note(noted)
    if shadow:
        shadow.offer(noted)


def _add_reload(app: FastAPI, service: Service, look_now: Callable[[], None] | None) -> None:
    """Add the route. `look_now` looks at the ledger, and may take as long as that takes; None: it follows none."""
    slot, threads = service.slot, Aside("look-at-ledger")
    under_way: asyncio.Future[None] | None = None

    @app.post(
        "/admin/reload",
        response_model=ReloadAnswer,
        responses={**REFUSED, 409: NOT_FOLLOWING, 422: ERRORS[422], 503: ERRORS[503]},
        summary="Look at the ledger now",
    )
    async def reload(request: Request) -> dict[str, Any]:
        """Take up a promotion or a rollback at once, and try a refused model again. Several at a time are one look."""
        nonlocal under_way
        if look_now is None:
            found, todo = "the server was started with a bundle", "Start it without --bundle to follow the ledger."
            raise RequestError(found, "one that follows the ledger", todo, status=409, reason_code="not_following")
        before = slot.current
        if under_way is None or under_way.done():
            under_way = threads.run(look_now)
        try:
            await asyncio.wait_for(asyncio.shield(under_way), LOOK_S)
        except TimeoutError as exc:
            found = f"the ledger was not read within {LOOK_S:g} s"
            raise RequestError(found, todo="It goes on; see /model.", status=503, reason_code="slow_store") from exc
        model = service.note_model(request)
        swapped = before is None or (before.digest, before.entry) != (model.digest, model.entry)
        return {"model": name_model(model), "entry": model.entry, "swapped": swapped, "problem": slot.problem}


def _add_state(app: FastAPI, service: Service, meters: Meters) -> None:
    """Add the routes of balancers, of Prometheus, and of who asks which model that is."""
    slot = service.slot

    @app.get("/health/live", responses={503: ERRORS[503]}, summary="Does it work, or must it be started again")
    async def live() -> dict[str, str]:
        service.require_live()
        return {"status": "live"}

    @app.get("/health/ready", response_model=ReadyAnswer, responses={503: ERRORS[503]}, summary="Can it answer")
    async def ready() -> dict[str, Any]:
        return {"status": "ready", "model": name_model(service.require_ready()), "problem": slot.problem}

    @app.get(
        "/model", response_model=ModelAnswer, responses={**REFUSED, 503: ERRORS[503]}, summary="Which model answers"
    )
    async def describe_model() -> dict[str, Any]:
        model = service.require_model()
        known = {"task", "classes", "image_size", "resize", "threshold", "thresholds", "abstain", "dataset"}
        card = {key: value for key, value in asdict(model.predictor.card).items() if key in known}
        runtime = {"engine": model.predictor.engine, "why": model.why}
        return {
            **name_model(model),
            "entry": model.entry,
            "since": model.promoted_at,
            "problem": slot.problem,
            "runtime": runtime,
            **card,
        }

    @app.get("/metrics", response_class=Response, responses=REFUSED, summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(meters.scrape(), headers={"Content-Type": CONTENT_TYPE_LATEST})
