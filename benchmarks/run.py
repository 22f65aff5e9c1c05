"""`make bench`: each hot path against a plain baseline, as one Markdown table. Writes only under .visionloop/bench."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cameras import bench_cameras
from commands import bench_repro, bench_startup
from embed import bench_embed
from engines import bench_engines
from epoch import bench_epoch
from frozen import bench_frozen
from gpu import bench_gpu
from ingest import bench_ingest
from loading import bench_loading
from neighbours import bench_neighbours
from prepare import bench_prepare
from row import HEADER, Row
from s3 import bench_s3
from serving import bench_serving
from visionloop.settings import apply_tool_environment

BENCH_DIR = Path(__file__).resolve().parents[1] / ".visionloop" / "bench"
BENCHES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "startup": lambda chosen: [bench_startup(BENCH_DIR)],
    "repro": lambda chosen: [bench_repro(BENCH_DIR)],
    "ingest": lambda chosen: bench_ingest(BENCH_DIR),
    "s3": lambda chosen: bench_s3(BENCH_DIR),
    "prepare": lambda chosen: bench_prepare(BENCH_DIR),
    "epoch": lambda chosen: bench_epoch(BENCH_DIR, chosen.photos, epochs=chosen.epochs, size_px=chosen.size),
    "gpu": lambda chosen: bench_gpu(BENCH_DIR, epochs=chosen.epochs, size_px=chosen.size),
    "loading": lambda chosen: bench_loading(BENCH_DIR, chosen.photos, size_px=chosen.size),
    "frozen": lambda chosen: bench_frozen(BENCH_DIR, chosen.photos, size_px=chosen.size),
    "embed": lambda chosen: bench_embed(BENCH_DIR, chosen.photos, size_px=chosen.size),
    "serving": lambda chosen: bench_serving(BENCH_DIR, chosen.photos, size_px=chosen.size),
    "cameras": lambda chosen: bench_cameras(BENCH_DIR, size_px=chosen.size),
    "engines": lambda chosen: bench_engines(BENCH_DIR, size_px=chosen.size),
    "neighbours": lambda chosen: [bench_neighbours()],
}
NAMES = tuple(BENCHES)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("--photos", type=Path, help="folder with train/CLASS/*.jpg; default: 400 synthetic JPEGs")
    parser.add_argument("--epochs", type=int, default=2, help="epochs that count, after one that does not (default 2)")
    parser.add_argument("--size", type=int, default=224, help="side of the square input in pixels (default 224)")
    parser.add_argument("--only", choices=NAMES, action="append", help="one of the benchmarks; may be given again")
    parser.add_argument("--rows-only", action="store_true", help="without the head of the table")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what was asked for, and print the table."""
    chosen = parse_arguments(sys.argv[1:])
    wanted = chosen.only or NAMES
    for name in ("MLFLOW_TRACKING_URI", "VISIONLOOP_STORE", "VISIONLOOP_HOME"):
        os.environ.pop(name, None)  # a benchmark never writes to a team's store
    apply_tool_environment(BENCH_DIR)
    if not chosen.rows_only:
        print(HEADER, flush=True)
    if len(wanted) == 1:
        for row in BENCHES[wanted[0]](chosen):
            print(row.to_markdown(), flush=True)
        return
    # Each in a process of its own: what one leaves behind (loaded libraries, memory that is kept) touches no other.
    options = [each for each in sys.argv[1:] if each != "--rows-only"]
    codes = [run_alone(name, options) for name in NAMES if name in wanted]
    sys.exit(max(map(abs, codes)))


def run_alone(name: str, options: list[str]) -> int:
    """Run one benchmark in a process of its own; return its exit code."""
    passed = [each for i, each in enumerate(options) if "--only" not in {each, options[i - 1] if i else ""}]
    done = subprocess.run([sys.executable, __file__, *passed, "--only", name, "--rows-only"], check=False)
    if done.returncode:
        print(f"benchmark {name} ended with code {done.returncode}", file=sys.stderr, flush=True)
    return done.returncode


if __name__ == "__main__":
    main()
