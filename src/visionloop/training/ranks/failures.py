"""Which rank was the cause of a failure, told as one error, and the file that carries it to the launcher."""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionloop import errors
from visionloop.errors import TrainingError, VisionLoopError, describe_first_line
from visionloop.training.ranks.world import PeerLost, World, is_peer_failure

STOPPED_CODES = (-signal.SIGTERM, 128 + signal.SIGTERM)
GO_ON = "The same command goes on from the last finished epoch."


def make_rank_error(world: World, exc: Exception) -> Exception:
    """Tell the loss of another rank from an error of this one; any of ours keeps its kind and names the rank."""
    if is_peer_failure(exc):
        reason = describe_first_line(exc.__cause__ or exc)
        return PeerLost(f"rank {world.rank} of {world.size}", f"lost another rank ({reason})", "all to go on", GO_ON)
    if isinstance(exc, VisionLoopError) and not world.is_first:
        where = f"rank {world.rank} of {world.size} on {socket.gethostname()}, {exc.where}"
        return type(exc)(where, exc.found, exc.expected, exc.todo)
    return exc


def write_error_file(error: Exception, env: Mapping[str, str]) -> None:
    """Write the file that torch.distributed.elastic reads: its message and time, and our error's parts beside them."""
    path = env.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    line = str(error) if isinstance(error, VisionLoopError) else f"{type(error).__name__}: {error}"
    extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
    value: dict[str, Any] = {"message": {"message": line, "extraInfo": extra}}
    if isinstance(error, VisionLoopError):
        value["visionloop"] = [type(error).__name__, error.where, error.found, error.expected, error.todo]
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(value))


def explain_failures(failures: Mapping[int, Any], num_ranks: int) -> VisionLoopError:
    """Return the error of the rank that failed first, as it was raised there; else its signal or exit code.

    `failures`: rank -> torch's ProcessFailure. One that only lost another rank, or was stopped for that, is no cause.
    """
    ours = {rank: failure.error_file_data.get("visionloop") for rank, failure in failures.items()}
    stopped = {rank for rank, failure in failures.items() if failure.exitcode in STOPPED_CODES}
    causes = [rank for rank in failures if rank not in stopped and (ours[rank] or [""])[0] != PeerLost.__name__]
    rank = min(causes or failures, key=lambda rank: (failures[rank].timestamp, rank))
    failure, where = failures[rank], f"rank {rank} of {num_ranks}"
    if told := ours[rank]:
        kind, *parts = told
        return getattr(errors, kind, TrainingError)(*parts)
    if failure.exitcode < 0:
        name = failure.signal_name()
        hint = "The system kills so when memory runs out: lower train.batch_size then. " if name == "SIGKILL" else ""
        return TrainingError(where, f"was killed by {name} (process {failure.pid})", "all to go on", hint + GO_ON)
    said = failure.error_file_data.get("message")
    reason = f": {said['message'][:200]}" if isinstance(said, dict) else ""
    found = f"ended with exit code {failure.exitcode}{reason}"
    return TrainingError(where, found, "0", f"Look at what it printed above. {GO_ON}")
