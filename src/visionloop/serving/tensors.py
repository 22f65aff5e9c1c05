"""Tensors of the Open Inference Protocol v2: requests and answers as they are on the wire. Knows no routes.

The input `images` is UINT8 [n, h, w, 3], of the model's own size, or BYTES [n]: encoded files, base64 in JSON. In
binary the body is a JSON head of `Inference-Header-Content-Length` bytes, and then the tensor.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visionloop.records import Card
from visionloop.serving.answers import Answer
from visionloop.serving.batcher import ImageInput
from visionloop.serving.body import RequestError, parse_json, read_base64
from visionloop.serving.swap import ServedModel

HEAD_LENGTH = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"
EXPECTED = "a request of the Open Inference Protocol v2"
# Of JSON, which is parsed in one go while no other request is answered: 0.1 s at most, and 30 MB.
MAX_MARKS = {b",": 2_000_000, b"[": 250_000, b"{": 1000}
SHOWN_CHARS = 80


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class RequestOptions(_Strict):
    """`binary_data_output`: all outputs in binary that do not say it themselves."""

    binary_data_output: bool = False


class InputOptions(_Strict):
    """`binary_data_size`: so many bytes behind the head are this tensor."""

    binary_data_size: int | None = Field(default=None, ge=0)


class OutputOptions(_Strict):
    """`binary_data`: this tensor comes behind the head of the answer."""

    binary_data: bool | None = None


class InputTensor(_Strict):
    """`data`: nested, or flat in row-major order. BYTES are base64."""

    name: Literal["images"]
    shape: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=4)
    datatype: Literal["UINT8", "BYTES"]
    parameters: InputOptions = InputOptions()
    data: list[Any] | None = None


class WantedTensor(_Strict):
    """An output that is asked for."""

    name: Literal["probabilities", "label", "abstained", "embedding"]
    parameters: OutputOptions = OutputOptions()


class InferRequest(_Strict):
    """Without `outputs` all of them come but `embedding`."""

    id: str = Field(default="", max_length=200)
    parameters: RequestOptions = RequestOptions()
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[WantedTensor] = Field(default=[], max_length=4)


def _inline(schema: Any, known: Mapping[str, Any]) -> Any:
    """Put definitions where they are named: the document has its own place for them."""
    if isinstance(schema, list):
        return [_inline(each, known) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(known[schema["$ref"].rpartition("/")[2]], known)
    return {key: _inline(value, known) for key, value in schema.items() if key != "$defs"}


_SCHEMA = InferRequest.model_json_schema()
REQUEST_SCHEMA = _inline(_SCHEMA, _SCHEMA["$defs"])  # of the body, in JSON


def read_request(
    body: bytes, head_length: int | None, card: Card, max_images: int
) -> tuple[InferRequest, Sequence[ImageInput]]:
    """Return a request, and its images: pixels (h, w, 3), or encoded files. Raises RequestError."""
    length = len(body) if head_length is None else head_length
    if length > len(body):
        raise RequestError(f"its {HEAD_LENGTH} is {length}", f"at most the {len(body)} bytes of its body")
    asked = _read_head(body[:length])
    tensor, tail = asked.inputs[0], memoryview(body)[length:]
    _check_shape(tensor, card, max_images)
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        has = "neither `data` nor" if size is None else "both `data` and"
        raise RequestError(f"its input has {has} `binary_data_size`", "one of the two")
    if len(tail) != (size or 0):
        expected = f"`binary_data_size`, which is {size or 0}"
        raise RequestError(f"{len(tail)} bytes follow its head", expected, f"Is {HEAD_LENGTH} right?")
    if tensor.datatype == "UINT8":
        numbers = _flatten(tensor) if tensor.data is not None else tail
        expected_bytes = int(np.prod(tensor.shape))
        if len(numbers) != expected_bytes:
            raise RequestError(f"its tensor has {len(numbers)} values", f"{expected_bytes} by its shape")
        return asked, list(np.frombuffer(numbers, np.uint8).reshape(tensor.shape))
    number = tensor.shape[0]
    if tensor.data is not None:
        files = [read_base64(text, f"data[{i}]") for i, text in enumerate(tensor.data)]
    else:
        files = _split_files(tail, number)
    if len(files) != number:
        raise RequestError(f"its tensor has {len(files)} values", f"{number} by its shape")
    return asked, files


def _read_head(data: bytes) -> InferRequest:
    for mark, most in MAX_MARKS.items():
        if (number := data.count(mark)) > most:
            found, todo = f"its JSON has {number} times {mark.decode()!r}", "Send the tensor flat, or in binary."
            raise RequestError(found, f"at most {most}", todo)
    try:
        return InferRequest.model_validate(parse_json(data, EXPECTED))
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part)[:SHOWN_CHARS] for part in first["loc"]) or "its JSON"
        raise RequestError(f"{where}: {first['msg']}", EXPECTED) from exc


def _check_shape(tensor: InputTensor, card: Card, max_images: int) -> None:
    height, width = card.image_size
    rest = [height, width, 3] if tensor.datatype == "UINT8" else []
    if tensor.shape[1:] != rest:
        expected = f"UINT8 [n, {height}, {width}, 3] or BYTES [n]"
        raise RequestError(f"its input is {tensor.datatype} {tensor.shape}", expected)
    if not 1 <= tensor.shape[0] <= max_images:
        raise RequestError(f"it has {tensor.shape[0]} images", f"1 to {max_images}", "Send several requests.")


def _flatten(tensor: InputTensor) -> bytes:
    """Return the values of a nested or flat list. Raises RequestError."""
    values: list[Any] = tensor.data or []
    try:
        for depth, side in enumerate(tensor.shape[1:], 1):
            if not values or not isinstance(values[0], list):
                break
            if len(values) != np.prod(tensor.shape[:depth]) or any(len(each) != side for each in values):
                raise RequestError("its `data` is nested in another way than its shape says", str(tensor.shape))
            values = list(chain.from_iterable(values))
        return bytes(values)
    except (TypeError, ValueError) as exc:
        if isinstance(exc, RequestError):
            raise
        raise RequestError("its `data` has something else than whole numbers from 0 to 255", "UINT8") from exc


def _split_files(tail: memoryview, number: int) -> list[bytes]:
    """Return the elements of BYTES: each is four bytes of length, little-endian, and as many bytes."""
    files, at = [], 0
    for _ in range(number):
        size = int.from_bytes(tail[at : at + 4], "little")
        if at + 4 + size > len(tail):
            raise RequestError("its BYTES end within an element", f"{number} elements, each behind its length")
        files.append(bytes(tail[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(tail):
        raise RequestError(f"{len(tail) - at} bytes follow the last of its BYTES", f"{number} elements")
    return files


def make_response(asked: InferRequest, model: ServedModel, answers: Sequence[Answer], request_id: str) -> Response:
    wanted = asked.outputs or [WantedTensor(name=name) for name in ("probabilities", "label", "abstained")]
    tensors, tail = [], []
    for each in wanted:
        tensor, data = _make_tensor(each.name, answers)
        is_binary = each.parameters.binary_data
        if asked.parameters.binary_data_output if is_binary is None else is_binary:
            encoded = _encode(data)
            tensor["parameters"] = {"binary_data_size": len(encoded)}
            tail.append(encoded)
        else:
            tensor["data"] = data if isinstance(data, list) else data.ravel().tolist()
        tensors.append(tensor)
    head = {
        "id": asked.id or request_id,
        "model_name": model.name,
        "model_version": model.version or "",
        "parameters": {"request_id": request_id, "digest": model.digest, "engine": model.predictor.engine},
        "outputs": tensors,
    }
    if not tail:
        return JSONResponse(head)
    encoded_head = json.dumps(head, separators=(",", ":")).encode()
    return Response(b"".join([encoded_head, *tail]), 200, {HEAD_LENGTH: str(len(encoded_head))}, BINARY)


def _make_tensor(name: str, answers: Sequence[Answer]) -> tuple[dict[str, Any], "np.ndarray[Any, Any] | list[str]"]:
    """Return an output without its data, and its data."""
    if name == "label":
        return {"name": name, "datatype": "BYTES", "shape": [len(answers)]}, [one.prediction for one in answers]
    if name == "abstained":
        values = np.array([one.abstained is not None for one in answers])
    elif name == "embedding":
        values = np.stack([one.embedding_d for one in answers]).astype("<f4")
    else:
        values = np.array([list(one.probabilities.values()) for one in answers], "<f4")
    datatype = "BOOL" if values.dtype == bool else "FP32"
    return {"name": name, "datatype": datatype, "shape": list(values.shape)}, values


def _encode(data: "np.ndarray[Any, Any] | list[str]") -> bytes:
    if isinstance(data, list):
        texts = [text.encode() for text in data]
        return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    return data.tobytes()
