"""The process that decodes: `python -m visionloop.video.worker`. A crash of the decoder ends only this process.

Jobs come on stdin, a line of JSON each; answers go to stdout: the length of a JSON object (4 bytes), the object, and as
many bytes as its key `bytes` says. It may use little memory, write no file, and ends when its parent is gone.
"""

import contextlib
import json
import os
import queue
import sys
import threading
from typing import BinaryIO

MAX_MEMORY_BYTES = 6 << 30


def main() -> None:
    """Answer jobs until stdin ends."""
    limit_process()
    from visionloop.video.decode import decode
    from visionloop.video.sample import DecodeJob

    jobs: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        for message, data in decode(DecodeJob(**json.loads(jobs.get()))):
            write_message(sys.stdout.buffer, message, data)


def write_message(out: BinaryIO, message: dict[str, object], data: bytes) -> None:
    """Write an answer."""
    head = json.dumps({**message, "bytes": len(data)}).encode()
    out.write(len(head).to_bytes(4, "big") + head + data)
    out.flush()


def limit_process() -> None:
    """Limit this process: it may write no files, make no core dumps, and use little memory."""
    import resource

    for kind, limit in (("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_AS", MAX_MEMORY_BYTES)):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS cannot limit memory
            resource.setrlimit(getattr(resource, kind), (limit, limit))


def _listen(jobs: "queue.Queue[bytes]") -> None:
    """Pass jobs on; end the process when its parent is gone, even while a frame is decoded."""
    for line in sys.stdin.buffer:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
