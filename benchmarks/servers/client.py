"""Clients that ask one after the other, on connections that are kept. Prints what they saw as JSON.

Arguments: port, number of clients, seconds, folder of images. It is a process of its own, and says what it used of the
processor: on the same machine its work is taken from the server's.
"""

import asyncio
import json
import re
import resource
import sys
import time
from pathlib import Path

PORT, CLIENTS, SECONDS, FOLDER = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4])
BOUNDARY = "----boundary-of-the-benchmark"


def make_request(data: bytes, name: str) -> bytes:
    """Return a whole request: a form with one file."""
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
    body = part.encode() + b"Content-Type: image/jpeg\r\n\r\n" + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    head = f"POST /predict HTTP/1.1\r\nHost: bench\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """Send one request, read the answer, return its status."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    assert length, head
    await reader.readexactly(int(length[1]))
    return int(head[9:12])


async def main() -> None:
    """Warm up for a second, then measure."""
    requests = [make_request(path.read_bytes(), path.name) for path in sorted(FOLDER.rglob("*.jpg"))[:200]]
    seconds: list[float] = []
    wrong = 0
    begin = time.perf_counter() + 1
    end = begin + SECONDS

    async def client(number: int) -> None:
        nonlocal wrong
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        place = number * 7
        while (started := time.perf_counter()) < end:
            status = await ask(reader, writer, requests[place % len(requests)])
            place += 1
            if started >= begin:
                seconds.append(time.perf_counter() - started)
                wrong += status != 200
        writer.close()

    before = resource.getrusage(resource.RUSAGE_SELF)
    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds.sort()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rate = (len(seconds) - wrong) / (time.perf_counter() - begin)
    p50_s, p99_s = (seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.99))
    print(json.dumps({"rate": rate, "p50_ms": 1000 * p50_s, "p99_ms": 1000 * p99_s, "wrong": wrong, "cpu_s": cpu_s}))


asyncio.run(main())
