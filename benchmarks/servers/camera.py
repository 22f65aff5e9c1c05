"""Cameras for the benchmark: H.264 in MPEG-TS over HTTP, in real time, as many as connect. Argument: CHANGE_S.

All show the same, by one clock: two pictures in turn. It prints its port and the time (epoch) at which the first change
was; one comes every so many seconds after it.
"""

import contextlib
import io
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import av
import numpy as np

FPS, SIZE_HW, BLOCK_PX = 25, (720, 1280), 16


def draw(number: int) -> np.ndarray:
    """Return the picture that is shown first (0) or second (1): squares of dark colours, or of all colours."""
    shape = (SIZE_HW[0] // BLOCK_PX, SIZE_HW[1] // BLOCK_PX, 3)
    coarse = np.random.default_rng(number).integers(0, (30, 256)[number], shape)
    return coarse.astype(np.uint8).repeat(BLOCK_PX, 0).repeat(BLOCK_PX, 1)


def make_film(num_frames: int) -> list[bytes]:
    """Return two pictures that move, each for so many frames, as the bytes of each frame."""
    file, pieces = io.BytesIO(), list[bytes]()
    with av.open(file, "w", format="mpegts", options={"flush_packets": "1"}) as container:
        options = {"preset": "veryfast", "tune": "zerolatency", "g": str(FPS)}
        stream: Any = container.add_stream("libx264", rate=FPS, options=options)
        (stream.height, stream.width), stream.pix_fmt = SIZE_HW, "yuv420p"
        for number in range(2 * num_frames):
            picture = np.roll(draw(number // num_frames), 2 * number, axis=1)
            before = file.tell()
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
            pieces.append(file.getvalue()[before : file.tell()])
    return pieces


class Camera(BaseHTTPRequestHandler):
    """Sends the film from its next key frame on, over and over."""

    pieces: list[bytes]
    began: float

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "video/mp2t")
        self.end_headers()
        number = (int((time.time() - self.began) * FPS) // FPS + 1) * FPS
        with contextlib.suppress(OSError):
            while True:
                time.sleep(max(0.0, self.began + number / FPS - time.time()))
                self.wfile.write(self.pieces[number % len(self.pieces)])
                number += 1

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    """Serve until it is ended."""
    Camera.pieces = make_film(round(float(sys.argv[1]) * FPS))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    server.daemon_threads = True
    Camera.began = time.time()
    print(server.server_address[1], Camera.began, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
