"""`POST /predict`: the model's answer for one image, or for several."""

import heapq
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from visionloop.errors import ImageError
from visionloop.serving.answers import Answer
from visionloop.serving.body import Upload
from visionloop.serving.envelope import name_request
from visionloop.serving.log import Noted
from visionloop.serving.metrics import Meters
from visionloop.serving.schemas import (
    ERRORS,
    PREDICT_BODY,
    REFUSED,
    BatchAnswer,
    PredictAnswer,
    PredictLabelsAnswer,
)
from visionloop.serving.service import Deadline, Service, is_single, make_answer, name_image, name_model
from visionloop.serving.swap import ServedModel

PREDICT = "/predict"
MAX_TOP_K = 1_000_000

Note = Callable[[Noted], None]


def add_predict(app: FastAPI, service: Service, meters: Meters, note: Note | None) -> None:
    """Add the route. `note` is called with each answer."""

    @app.post(
        PREDICT,
        response_model=PredictLabelsAnswer | PredictAnswer | BatchAnswer,
        responses={**REFUSED, **ERRORS},
        openapi_extra={"requestBody": PREDICT_BODY},
        summary="Classify one image, or several",
    )
    async def predict(
        request: Request,
        top_k: Annotated[
            int | None,
            Query(ge=1, le=MAX_TOP_K, description="`probabilities` has only the so many highest, the highest first"),
        ] = None,
        embedding: Annotated[bool, Query(description="Answer with the embedding too: one vector an image")] = False,
        x_deadline_ms: Deadline = None,
    ) -> Response:
        """Send the image as the body, one or more files in a form, or JSON with base64.

        JPEG, PNG, WebP or AVIF; the bytes decide. HEIC, where the extra `heic` is installed.

        A model whose task is multilabel (see /model) also answers with the list of labels, which may be empty. Where
        the model does not know, `abstained` says why; `prediction` is then its best guess.
        """
        limit = service.read_limit(x_deadline_ms)
        async with service.take_in(request, limit) as uploads:
            model = service.note_model(request)
            answers = await service.answer(request, model, [upload.data for upload in uploads], limit)
        for answer in answers:
            if isinstance(answer, Answer):
                meters.count_answer(answer)
        if note:
            note_answers(note, request, model, uploads, answers)
        described = make_answer(
            uploads, answers, lambda answer: _describe(answer, top_k, embedding=embedding), request.state.request_id
        )
        return JSONResponse({**described, "model": name_model(model), **name_request(request)})


def note_answers(
    note: Note,
    request: Request,
    model: ServedModel,
    uploads: Sequence[Upload],
    answers: Sequence[Answer | ImageError],
) -> None:
    """Note the answers, for the prediction log and the shadow. It waits for nothing."""
    state, at_s = request.state, time.time()
    total_ms = 1000 * (time.perf_counter() - state.started)
    for number, (upload, answer) in enumerate(zip(uploads, answers, strict=True)):
        if isinstance(answer, Answer):
            request_id = name_image(state.request_id, number, is_only=is_single(uploads))
            client = getattr(state, "who", None)
            note(Noted(request_id, at_s, model, upload.data, answer, total_ms, state.client_request_id, client))


def _describe(answer: Answer, top_k: int | None, *, embedding: bool) -> dict[str, Any]:
    labels = {} if answer.labels is None else {"labels": list(answer.labels)}
    probabilities = answer.probabilities
    if top_k is not None:
        probabilities = dict(heapq.nlargest(top_k, probabilities.items(), key=lambda item: item[1]))
    return {
        "prediction": answer.prediction,
        **labels,
        "confidence": answer.confidence,
        "abstained": answer.abstained,
        "probabilities": probabilities,
        **({"embedding": answer.embedding_d.tolist()} if embedding else {}),
        "timing": {
            "queue_ms": round(answer.timing.queue_s * 1000, 3),
            "decode_ms": round(answer.timing.decode_s * 1000, 3),
            "network_ms": round(answer.timing.network_s * 1000, 3),
            "cached": answer.timing.is_cached,
        },
    }
