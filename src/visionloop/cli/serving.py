"""Commands that answer: predict, serve."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import app
from visionloop.cli.progress import make_progress
from visionloop.cli.stages import die_with_guardian
from visionloop.workspace import open_workspace

if TYPE_CHECKING:
    from visionloop.predict import FilePrediction

BAR_CHARS = 20
ADDRESSES = "A folder, NAME@champion, NAME@3 or s3://..."


@app.command()
def predict(
    paths: Annotated[list[str], typer.Argument(help="Images, folders, or globs in quotes.")],
    out: Annotated[Path | None, typer.Option(help="Write every answer to a .jsonl or .csv file.")] = None,
    bundle: Annotated[str | None, typer.Option(help=f"{ADDRESSES}; default: the champion.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 3,
) -> None:
    """Answer for images, folders and globs with the champion. An image that cannot be used gets its reason.

    Examples:

      visionloop predict photo.jpg

      visionloop predict "photos/**/*.jpg" --out answers.jsonl

      visionloop predict photo.jpg --bundle models/candidate

      visionloop predict photo.jpg --bundle pets@3
    """
    from visionloop.errors import SourceError, shorten
    from visionloop.predict import find_images, predict_files, write_answers
    from visionloop.promotion.models import load_champion, load_model

    workspace = open_workspace()
    files = find_images(paths, out=out)
    predictor = load_model(bundle, lambda: workspace) if bundle else load_champion(workspace)
    progress = make_progress("answered", "images") if len(files) > 64 else (lambda done, total: None)
    answers = predict_files(predictor, files, on_progress=progress)
    shown = answers[:20] if out else answers
    width = max(len(_shorten_path(a.path)) for a in shown)
    for answer in shown:
        for line in describe_answer(answer, width, top):
            print(line)
    if out:
        write_answers(answers, out, predictor)
        print(f"{len(answers):,} answers of bundle {predictor.digest[:12]} in {out}")
    if failed := sum(a.prediction is None for a in answers):
        print(f"{failed:,} of {len(answers):,} files could not be used")
    if failed == len(answers):
        found = f"none of {failed:,} could be used: {answers[0].error}"
        raise SourceError(shorten(paths), found, "", "Name images that can be read.")


def describe_answer(answer: "FilePrediction", width: int, top: int) -> list[str]:
    """Return one answer as lines: the likeliest classes with bars, all that were chosen, or the reason why not."""
    name = f"{_shorten_path(answer.path):<{width}}"
    if answer.prediction is None:
        return [f"{name}  -- {answer.error}"]
    chosen = answer.prediction.labels
    if chosen is None:
        chosen = (answer.prediction.prediction,)
    ranked = sorted(answer.prediction.probabilities.items(), key=lambda kv: -kv[1])
    ranked = [(label, p) for place, (label, p) in enumerate(ranked) if place < top or label in chosen]
    label_width = max(len(label) for label, _ in ranked)
    lines = [] if chosen else [f"{name}  -- no label"]
    for label, p in ranked:
        mark = "*" if label in chosen else " "
        bar = ("█" * round(p * BAR_CHARS)).ljust(BAR_CHARS, "·")
        lines.append(f"{' ' * width if lines else name}  {mark} {label:<{label_width}}  {bar} {p:6.1%}")
    return lines


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    bundle: Annotated[str | None, typer.Option(help=f"{ADDRESSES}; default: follow the champion.")] = None,
    check: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="Only try it: a folder, or a digest of the store.")
    ] = None,
) -> None:
    """Serve the champion over HTTP, and follow the ledger: a promotion or a rollback is taken up without a restart.

    Examples:

      visionloop serve

      curl -F file=@photo.jpg http://127.0.0.1:8000/predict

      visionloop serve --port 0 --bundle models/candidate

      visionloop serve --check models/candidate
    """
    from visionloop.serving.main import run_server

    die_with_guardian()
    workspace = open_workspace()
    if check is not None:
        from visionloop.serving.check import check_serving

        number = check_serving(workspace, check)
        print(f"the server answers {number} golden images of {check} as the bundle does")
        return
    run_server(
        workspace,
        host=host,
        port=port,
        bundle=bundle,
        on_ready=lambda url: print(f"serving {workspace.name} on {url} (docs: {url}/docs); Ctrl-C stops", flush=True),
    )


def _shorten_path(path: str, most: int = 48) -> str:
    return path if len(path) <= most else "…" + path[1 - most :]
