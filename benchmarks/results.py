"""What the sources of the examples reported, and what the same job gives here, each on its data where a path names it.

    python benchmarks/results.py --horses-or-humans DIR --cats-and-dogs DIR --dog-breeds DIR --fourteen-classes DIR

Each job is the example of its name, as a person runs it: `new`, `ingest PATH`, `dvc repro`. A job without a path is a
row that says so. --keep FOLDER keeps the workspaces; the same command then goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from commands import make_workspace, run_visionloop
from visionloop.pipeline import make_stage_environment


@dataclass(frozen=True)
class Job:
    """An example, what its source did, and the accuracy that it reported (None: it reported none)."""

    example: str
    source: str
    reported: float | None


JOBS = (
    Job("horses-or-humans", "ResNet18, fine-tuned, one sigmoid unit; 256 validation photos", 0.95),
    Job("cats-and-dogs", "embeddings of 25,000 photos, 5 neighbours", None),
    Job("dog-breeds", "MobileNetV2, frozen; 1,000 photos, 80/20 by seed 13", 0.66),
    Job("fourteen-classes", "a depthwise CNN on 1024 x 768, streamed in batches", None),
)


def main() -> None:
    """Run the jobs whose data is there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for job in JOBS:
        parser.add_argument(f"--{job.example}", type=Path, metavar="PATH", help=job.source)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the workspaces here")
    given = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as thrown_away:
        place = given["keep"] or Path(thrown_away)
        place.mkdir(parents=True, exist_ok=True)
        rows = [make_row(job, given[job.example.replace("-", "_")], place.resolve()) for job in JOBS]
    head = ["| job | its source | reported | here | 95 % | test images | seconds |", "|---|---|---|---|---|---|---|"]
    text = "\n".join(head + rows)
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        print(text)


def make_row(job: Job, path: Path | None, place: Path) -> str:
    """Run a job, and return its row."""
    reported = "none" if job.reported is None else f"{job.reported:.2f}"
    begin = f"| {job.example} | {job.source} | {reported} |"
    if path is None:
        return f"{begin} skipped: no --{job.example} | | | |"
    home = place / job.example
    started = time.perf_counter()
    is_new = not (home / "data" / "dataset.json").is_file()
    make_workspace(home, job.example)
    if is_new:
        run_visionloop(home, "ingest", str(path.resolve()))
    env = make_stage_environment(home, os.environ)
    subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=home, env=env, check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    accuracy = json.loads((home / "reports" / "intervals.json").read_text())["metrics"]["accuracy"]
    with (home / "reports" / "predictions.csv").open(encoding="utf-8") as file:
        num_test = sum(1 for _ in file) - 1
    span = f"{accuracy['low']:.4f} to {accuracy['high']:.4f}"
    return f"{begin} {accuracy['value']:.4f} | {span} | {num_test:,} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
