"""A plain loop over cameras: PyAV decodes, ONNX Runtime answers, a thread for each camera, one session.

Arguments: model.onnx, px, the probability above which it is the second class, seconds to the next frame, seconds in
all, addresses. It prints a JSON line for each answer, and before it one for a change, as `visionloop predict` does.
"""

import json
import sys
import threading
import time
from datetime import UTC, datetime

import av
import numpy as np
import onnxruntime

MODEL, SIZE_PX, THRESHOLD, EVERY_S, SECONDS = sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:6])
telling = threading.Lock()
session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


def watch(address: str, until: float) -> None:
    """Answer for a frame every so often."""
    due, before = 0.0, -1
    with av.open(address) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            now = time.time()
            if now > until:
                return
            if now < due:
                continue
            due = now + EVERY_S - 0.5 / 25
            image_hwc = frame.reformat(SIZE_PX, SIZE_PX, "rgb24").to_ndarray()
            logits_k = session.run(["logits"], {"images": image_hwc[None]})[0][0]
            share = 1 / (1 + np.exp(-float(logits_k[-1] - (logits_k[0] if len(logits_k) > 1 else 0.0))))
            answer, at = int(share >= THRESHOLD), datetime.now(UTC).isoformat()
            for kind in ("change", "frame") if answer != before else ("frame",):
                with telling:
                    print(json.dumps({"kind": kind, "time": at, "source": address, "answer": answer}), flush=True)
            before = answer


end = time.time() + SECONDS
threads = [threading.Thread(target=watch, args=(address, end)) for address in sys.argv[6:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
