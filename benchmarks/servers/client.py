"""Clients that ask one after the other, on connections that are kept. Prints what they saw as JSON.

Arguments: port, number of clients, seconds, folder of images, how many of them. It is a process of its own, and says
what it used of the processor: on the same machine its work is taken from the server's.
"""

import asyncio
import json
import re
import resource
import sys
import time
from pathlib import Path

PORT, CLIENTS, SECONDS = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
FOLDER, NUM_IMAGES = Path(sys.argv[4]), int(sys.argv[5])
BOUNDARY = "----boundary-of-the-benchmark"


def make_request(data: bytes, name: str) -> bytes:
    """Return a whole request: a form with one file."""
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
    body = part.encode() + b"Content-Type: image/jpeg\r\n\r\n" + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\n"
    head += f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
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
    """Measure from the moment that each client has had one answer."""
    requests = [make_request(path.read_bytes(), path.name) for path in sorted(FOLDER.rglob("*.jpg"))[:NUM_IMAGES]]
    seconds: list[float] = []
    wrong = in_time = 0
    warm = asyncio.Barrier(CLIENTS)

    async def client(number: int) -> None:
        nonlocal wrong, in_time
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        await ask(reader, writer, requests[number % len(requests)])
        await warm.wait()
        begin, place = time.perf_counter(), number * 7
        while (started := time.perf_counter()) < begin + SECONDS:
            status = await ask(reader, writer, requests[place % len(requests)])
            place += 1
            seconds.append(time.perf_counter() - started)
            wrong += status != 200
            in_time += status == 200 and time.perf_counter() <= begin + SECONDS
        writer.close()

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds.sort()
    p50_s, p99_s = (seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.99))
    found = {"rate": in_time / SECONDS, "p50_ms": 1000 * p50_s, "p99_ms": 1000 * p99_s, "wrong": wrong}
    print(json.dumps({**found, "cpu_s": used.ru_utime + used.ru_stime}))


asyncio.run(main())
