"""The HTTP interface of a model, put together. Builds no model, reads no settings, opens no socket; the routes are in
`predict.py`, `inference.py`, `similar.py`, `explain.py`, `video.py`, `feedback.py`, `state.py` and `page/`.

A wrong request gets a 4xx. A full server, or one without a model, answers 503. Only our own bugs give a 500.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial

from fastapi import Depends, FastAPI

from visionloop import __version__
from visionloop.serving.access import Access
from visionloop.serving.batcher import Batcher
from visionloop.serving.body import Inbox, Limits
from visionloop.serving.envelope import ERROR_KINDS, Envelope, answer_error, check_options
from visionloop.serving.explain import add_explain
from visionloop.serving.feedback import FeedbackBook, add_feedback
from visionloop.serving.inference import INFER, add_inference
from visionloop.serving.log import Noted, PredictionLog
from visionloop.serving.metrics import Meters
from visionloop.serving.page import add_page
from visionloop.serving.predict import PREDICT, add_predict
from visionloop.serving.schemas import complete_document
from visionloop.serving.service import Service
from visionloop.serving.shadow import Shadow
from visionloop.serving.similar import add_similar
from visionloop.serving.state import add_reload, add_state
from visionloop.serving.swap import ModelSlot
from visionloop.serving.video import add_video
from visionloop.store import ObjectStore


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
    meters = Meters(slot, lambda: batcher.depth, lambda: access.has_problem, log, book)
    meters.shadow = shadow
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
    add_reload(app, service, look_now)
    add_state(app, service, meters)
    add_page(app, keeps_images=log is not None and log.keeper is not None)
    complete_document(app)
    return app


def _note(log: PredictionLog, shadow: Shadow | None, noted: Noted) -> None:
    log.note(noted)
    if shadow:
        shadow.offer(noted)
