"""What a server says of itself: its health, its model, its figures; and the look at the ledger that one can ask for."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from visionloop.serving.aside import Aside
from visionloop.serving.body import RequestError
from visionloop.serving.metrics import Meters
from visionloop.serving.schemas import ERRORS, NOT_FOLLOWING, REFUSED, ModelAnswer, ReadyAnswer, ReloadAnswer
from visionloop.serving.service import Service, name_model

LOOK_S = 30.0


def add_reload(app: FastAPI, service: Service, look_now: Callable[[], None] | None) -> None:
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


def add_state(app: FastAPI, service: Service, meters: Meters) -> None:
    """Add the routes of balancers, of Prometheus, and of who asks which model that is."""
    slot = service.slot

    @app.get("/health/live", responses={503: ERRORS[503]}, summary="Does it work, or must it be started again")
    async def live() -> dict[str, str]:
        if service.batcher.is_stuck(service.inbox.limits.stuck_s):
            raise RequestError("the network does not finish", todo="Start it again.", status=503, reason_code="stuck")
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
