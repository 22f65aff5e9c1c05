"""Pretrained weights: from torchvision's hub, a file, a bucket or the web to a checked file, and read from it.

    .visionloop/weights/<sha256>          what came from an s3:// or https:// address
    TORCH_HOME/hub/checkpoints/<name>     torchvision's own, under the names that torchvision gives them

A file gets its name when all of it has the digest that was asked for; nothing is read before.
"""

import hashlib
import ipaddress
import os
import pickle
import re
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torchvision import models

from visionloop.bundle import hash_file
from visionloop.errors import ObjectMissing, SettingsError, StoreError, TrainingError
from visionloop.networks.names import REMOTE, SUPPLY, resolve_path
from visionloop.networks.names import WEIGHTS as WHERE
from visionloop.store import open_bucket

# Where training scripts put the state dict in their checkpoints.
INNER = ("state_dict", "model_state_dict", "model")
# DenseNet's published weights were saved under older names: `norm.1.weight` is `norm1.weight` (as torchvision does).
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
State = dict[str, Tensor]
MAX_BYTES = 4 << 30
SILENCE_S = 30
MAX_SECONDS = 3600
PIECE_BYTES = 1 << 20
_HUB_DIGEST = re.compile(r"-([0-9a-f]{8,})\.\w+$")


def read_weights(path: Path) -> State:
    """Read a safetensors file or a state dict that torch saved.

    Raises:
        TrainingError: there is no such file, or it holds something else than names and tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
        loaded = _load(path, head)
    except FileNotFoundError as exc:
        raise TrainingError(WHERE, f"{path} does not exist", "none, default or a file", SUPPLY) from exc
    except Exception as exc:  # of a damaged or hostile file: zip, pickle, header, memory
        if isinstance(exc, TrainingError):
            raise
        why = _explain(exc)
        raise TrainingError(WHERE, f"{path.name} cannot be read as weights ({why})", "tensors alone", SUPPLY) from exc
    state = _find_state(loaded)
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise TrainingError(WHERE, f"{path.name} holds no state dict", "names and tensors", SUPPLY)
    return {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}


def _load(path: Path, head: bytes) -> Any:
    if head[8:9] == b"{":
        from safetensors.torch import load_file

        return load_file(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, "cpu", weights_only=True)
    begins = head.split(b"\n")[0].decode("ascii", "replace").strip() or "nothing"
    raise TrainingError(
        WHERE,
        f"{path.name} cannot be read as weights (it begins with {begins!r})",
        "a safetensors file or one that torch.save wrote",
        SUPPLY,
    )


def _find_state(loaded: Any) -> dict[Any, Any] | None:
    if not isinstance(loaded, dict):
        return None
    return next((loaded[key] for key in INNER if isinstance(loaded.get(key), dict)), loaded)


def _explain(exc: Exception) -> str:
    if isinstance(exc, pickle.UnpicklingError):
        return "it holds more than tensors, or is damaged"
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:120].rstrip(".")


def find_weights(weights: str, name: str, sha256: str | None, home: Path) -> Path:
    """Return the file of some weights, fetched if it is not here: `default`, a path, an s3:// or https:// address.

    Raises:
        TrainingError: it cannot be had, or its bytes are not those of `sha256`.
    """
    if weights == "default":
        return _find_in_hub(name, home)
    if weights.startswith(REMOTE):
        assert sha256, "the parameters ask for it"
        return _find_in_cache(weights, sha256, home / ".visionloop" / "weights" / sha256)
    path = resolve_path(weights, home)
    if sha256 and path.is_file() and (found := hash_file(path)) != sha256:
        raise _other_bytes(weights, found, sha256)
    return path


def find_hub_url(name: str) -> str | None:
    """Return the address of torchvision's default weights of a network; None where it has none."""
    try:
        chosen: Any = models.get_model_weights(name).DEFAULT
    except ValueError:
        return None
    return str(chosen.url)


def _find_in_hub(name: str, home: Path) -> Path:
    url = find_hub_url(name)
    if url is None:
        raise TrainingError(WHERE, f"there are no default weights for {name}", "none or a file", SUPPLY)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    match = _HUB_DIGEST.search(path.name)
    digest = match[1] if match else ""
    if path.is_file():
        if hash_file(path).startswith(digest):
            return path
        path.unlink()
    try:
        return _keep(_open_web(url), path, digest, url)
    except TrainingError as exc:
        folder = path.parent.relative_to(home) if path.parent.is_relative_to(home) else path.parent
        raise TrainingError(
            WHERE,
            f"cannot download {path.name} ({exc.found})",
            f"a network, or that file in {folder}/",
            f"Fetch {url} elsewhere and put it there. Or: {SUPPLY}",
        ) from exc


def _find_in_cache(address: str, sha256: str, path: Path) -> Path:
    if path.is_file():
        if hash_file(path) == sha256:
            return path
        path.unlink()
    pieces = _open_bucket(address) if address.startswith("s3://") else _open_web(address)
    return _keep(pieces, path, sha256, address)


def _keep(pieces: Iterator[bytes], path: Path, digest: str, address: str) -> Path:
    """Write what arrives, and name it when its sha256 begins with `digest`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}-{os.getpid()}.part")
    hasher = hashlib.sha256()
    try:
        with staged.open("wb") as file:
            for piece in pieces:
                hasher.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if not hasher.hexdigest().startswith(digest):
            raise _other_bytes(address, hasher.hexdigest(), digest)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def _open_bucket(address: str) -> Iterator[bytes]:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    try:
        data = open_bucket(f"s3://{bucket}").fetch(key, MAX_BYTES)
    except ObjectMissing as exc:
        raise TrainingError(WHERE, f"there is no {address}", "an object", "Correct the address.") from exc
    except (StoreError, SettingsError) as exc:
        raise TrainingError(f"{WHERE} {address}", exc.found, exc.expected, exc.todo) from exc
    if len(data) > MAX_BYTES:
        raise _too_large(address)
    yield data


def _open_web(address: str) -> Iterator[bytes]:
    """Yield the body at an address, a piece at a time. Raises TrainingError."""
    _check_address(address)
    deadline = time.monotonic() + MAX_SECONDS
    shown = mask(address)
    opener = urllib.request.build_opener(_SafeRedirects)
    request = urllib.request.Request(address, headers={"User-Agent": "visionloop", "Accept-Encoding": "identity"})
    try:
        with opener.open(request, timeout=SILENCE_S) as answer:
            promised = int(answer.headers.get("Content-Length") or 0)
            received = 0
            while piece := answer.read(PIECE_BYTES):
                received += len(piece)
                if max(received, promised) > MAX_BYTES:
                    raise _too_large(shown)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {MAX_SECONDS} s")
                yield piece
    except urllib.error.HTTPError as exc:
        raise _unreachable(shown, f"answers {exc.code} {exc.reason}") from exc
    except (OSError, HTTPException, ValueError) as exc:  # URLError is an OSError; a cut-off body an HTTPException
        reason = getattr(exc, "reason", None) or exc or type(exc).__name__
        raise _unreachable(shown, f"cannot be read ({reason})") from exc
    if received < promised:
        raise _unreachable(shown, f"was cut off after {received:,} of {promised:,} bytes")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to where one may go: never from https to http."""

    def redirect_request(self, *request: Any, **options: Any) -> Any:
        found = super().redirect_request(*request, **options)
        if found is not None:
            _check_address(found.full_url)
        return found


def _check_address(address: str) -> None:
    """Refuse what others could read or change on the way, and passwords: params.yaml lies in git."""
    parts = urlsplit(address)
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or ""))
    if not is_safe or not parts.hostname:
        raise TrainingError(WHERE, f"got {mask(address)!r}", "https://", "Correct the address.")
    if "@" in parts.netloc:
        raise TrainingError(
            WHERE,
            f"got a name or password in {mask(address)!r}",
            "an address without",
            "Use a signed address, or s3:// with AWS_* in the environment.",
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def mask(address: str) -> str:
    """Return an address as it may be shown: without a name, a password or a signature."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" + ("?..." if parts.query else "")


def _other_bytes(address: str, found: str, expected: str) -> TrainingError:
    return TrainingError(
        WHERE,
        f"{mask(address) if '://' in address else address} has the sha256 {found[:12]}",
        expected[:12],
        "Correct train.weights or train.weights_sha256; if both are right, the file was changed.",
    )


def _too_large(shown: str) -> TrainingError:
    return TrainingError(WHERE, f"{shown} is too large", f"at most {MAX_BYTES >> 30} GiB", SUPPLY)


def _unreachable(shown: str, found: str) -> TrainingError:
    return TrainingError(WHERE, f"{shown} {found}", "a file of weights", f"Correct the address. Or: {SUPPLY}")
