"""`POST /explain`: which parts of an image hold up an answer. The network is asked in its idle time alone."""

import asyncio
import base64
from functools import partial
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from visionloop.errors import shorten
from visionloop.explain import ACROSS, Explanation, encode_heat, explain_in_pieces, get_step, list_squares
from visionloop.serving.batcher import Batcher
from visionloop.serving.body import RequestError, Upload
from visionloop.serving.envelope import name_request
from visionloop.serving.schemas import ERRORS, EXPLAIN_BODY, REFUSED, ToRequest
from visionloop.serving.service import Deadline, Places, Service, name_model
from visionloop.serving.swap import ServedModel

AT_ONCE = 4
LEAST_ACROSS, SHOWN_ACROSS = 4, 8
SIDE_PX = 320
PNG = "image/png"


class ExplainAnswer(ToRequest):
    """What holds up the answer `label`, whose probability is `probability`.

    `cells` are rows of numbers over the picture as the model sees it, after its resizing: by how much the logit of
    `label` falls where this part is hidden; below 0 it rises. `num_images` says how many images the network was asked.
    `heat_map` is the same as a PNG in base64, over the picture in grey: red holds the answer up, blue speaks against.
    """

    label: str
    probability: float = Field(ge=0, le=1)
    logit: float
    cells: list[list[float]]
    image_size: list[int]
    num_images: int
    heat_map: str
    heat_map_type: Literal["image/png"]


def add_explain(app: FastAPI, service: Service) -> None:
    """Add the route."""
    batcher = service.batcher
    places = Places(batcher, "explanations", AT_ONCE)

    @app.post(
        "/explain",
        response_model=ExplainAnswer,
        responses={200: {"content": {PNG: {"schema": {"type": "string", "format": "binary"}}}}, **REFUSED, **ERRORS},
        openapi_extra={"requestBody": EXPLAIN_BODY},
        summary="Which parts of an image hold up the answer",
    )
    async def explain(
        request: Request,
        label: Annotated[str | None, Query(description="The class that is asked about; without it: the answer")] = None,
        across: Annotated[
            int, Query(ge=LEAST_ACROSS, le=ACROSS, description="Cells along the longer side: finer takes longer")
        ] = SHOWN_ACROSS,
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """Send one image as for /predict. Each part of it is covered in turn, and the network is asked again.

        That is (across + 2)² images at most, which count for the rate of your key, and wait while others want
        predictions. With `Accept: image/png` the answer is the picture alone.
        """
        with places.take():
            async with service.inbox.receive(request, batcher.require_room) as uploads:
                data = _take_only(uploads)
                model = service.note_model(request)
                card = model.predictor.card
                if label is not None and label not in card.classes:
                    expected = f"one of {shorten(card.classes)}"
                    raise RequestError(f"`label` is {label[:80]!r}", expected, status=422, reason_code="unknown_label")
                num_images = 1 + len(list_squares(*card.image_size, across=across))
                request.state.access.charge(request, num_images)
                work = _explain(batcher, model, data, label, across)
                found, png = await service.finish(request, work, service.read_limit(x_deadline_ms))
        if PNG in request.headers.get("accept", ""):
            return Response(png, media_type=PNG)
        step = get_step(*card.image_size, across=across)
        return JSONResponse(
            {
                "label": found.name,
                "probability": found.probability,
                "logit": found.logit,
                "cells": found.falls_hw[::step, ::step].round(6).tolist(),
                "image_size": list(card.image_size),
                "num_images": num_images,
                "heat_map": base64.b64encode(png).decode(),
                "heat_map_type": PNG,
                "model": name_model(model),
                **name_request(request),
            }
        )


def _take_only(uploads: list[Upload]) -> bytes:
    if len(uploads) != 1 or uploads[0].in_list:
        raise RequestError(f"it has a list of {len(uploads)} images", "one image", "Send one a request.")
    return uploads[0].data


async def _explain(
    batcher: Batcher, model: ServedModel, data: bytes, label: str | None, across: int
) -> tuple[Explanation, bytes]:
    """Return the explanation and its picture. Raises ImageError."""
    image_hwc = await batcher.decode(model, data)
    size = batcher.spare_size
    pieces = explain_in_pieces(model.predictor, image_hwc, label, size=size, across=across)
    while (found := await batcher.run_spare(partial(next, pieces), size)) is None:
        pass
    return found, await asyncio.to_thread(encode_heat, image_hwc, found, SIDE_PX)
