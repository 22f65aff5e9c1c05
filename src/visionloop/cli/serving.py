"""Commands that answer, or let others answer: predict, explain, export, serve."""

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say_next
from visionloop.cli.stages import die_with_guardian
from visionloop.cli.waiting import make_progress, show_waiting
from visionloop.records import measure_width
from visionloop.workspace import open_workspace

if TYPE_CHECKING:
    from visionloop.cli.pictures import AnswerPictures
    from visionloop.predict import FilePrediction
    from visionloop.predictor import Predictor
    from visionloop.workspace import Workspace

BAR_CHARS = 20
SHOWN_OF_TABLE = 20
FEW = 8
MANY = 500  # images for which the fastest engine is worth looking for
ADDRESSES = "A folder, NAME@champion, NAME@3 or s3://..."
Sheet = Annotated[
    Path | None, typer.Option(help="Draw some images with their answers and the likeliest classes, as .png.")
]
Pictures = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Save each image with its answer there, as .png; none is overwritten."),
]


@app.command()
def predict(
    paths: Annotated[list[str], typer.Argument(help="Images, folders, or globs in quotes.")],
    *,
    out: Annotated[
        Path | None, typer.Option(help="Write every answer to a .jsonl, .csv or .parquet file; resumable.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="kaggle: a .csv of `id` and one column of probabilities a class.")
    ] = None,
    sheet: Sheet = None,
    bundle: Annotated[str | None, typer.Option(help=f"{ADDRESSES}; default: the champion.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Classes to show: 3, or 1 of many images.")] = None,
    pictures: Pictures = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer for images, folders and globs with the champion. An image that cannot be used gets its reason.

    Examples:

      visionloop predict photo.jpg

      visionloop predict "photos/**/*.jpg" --out answers.jsonl

      visionloop predict test/ --out submission.csv --format kaggle

      visionloop predict photos/ --sheet answers.png

      visionloop predict photos/ --pictures answered/

      visionloop predict photo.jpg --bundle pets@3
    """
    from visionloop.cli.pictures import AnswerPictures, require_png
    from visionloop.predict import Table, find_images, predict_files, predict_in_chunks

    workspace = open_workspace()
    table = Table.plan(out, format)
    require_png(sheet, "--sheet")
    files = find_images(paths)
    tell: Callable[[str], None] = (lambda line: None) if as_json else print
    saved = AnswerPictures(pictures, files) if pictures else None
    predictor = _open_predictor(workspace, bundle, len(files), tell)
    progress = make_progress("answered", "images", quiet=quiet or as_json or len(files) <= 64)
    width = max(measure_width(_shorten_path(str(path))) for path in files[:SHOWN_OF_TABLE])
    show = Shown(width, top or (3 if len(files) <= FEW else 1), len(files), tell)
    draw = partial(saved.draw, classes=predictor.card.classes) if saved else iter
    if table is None:
        show.read(draw(predict_files(predictor, files, on_progress=progress)), keep=as_json)
    else:
        show.most, folder = SHOWN_OF_TABLE, workspace.settings.hidden_dir / "predict"
        with predict_in_chunks(predictor, files, table, folder, on_progress=progress, tell=tell) as chunks:
            show.read(draw(chunks.read()))
            table.write(chunks.read(), predictor)
        rows = table.describe(len(files), len(files) - show.counts.total())
        tell(f"{rows}, of bundle {predictor.digest[:12]}, in {out}")
    _tell_counts(show, predictor, files, saved, sheet)
    if as_json:
        print_json({"bundle": predictor.digest, "counts": show.counts, "num_files": len(files), "answers": show.kept})
    _require_answer(show, paths, len(files))


def _require_answer(show: "Shown", paths: Sequence[str], number: int) -> None:
    from visionloop.errors import SourceError, shorten

    if not show.counts:
        found = f"none of {number:,} could be used: {show.problem}"
        raise SourceError(shorten(paths), found, "", "Name images that can be read.")


def _tell_counts(
    show: "Shown", predictor: "Predictor", files: Sequence[Path], saved: "AnswerPictures | None", sheet: Path | None
) -> None:
    """Tell what the answers came to and where their pictures are; draw the sheet."""
    from visionloop.cli.pictures import write_picture
    from visionloop.predict import draw_sheet

    numbers = _describe_numbers(predictor.card.classes)
    if len(files) > 1:
        show.tell(describe_counts(show.counts, len(files)))
    if saved and show.counts:
        show.tell(f"{saved.number:,} pictures in {saved.folder}{numbers}")
    if sheet and show.counts:
        write_picture(sheet, draw_sheet(predictor, files))
        show.tell(f"some of them in {sheet}{numbers}")


def _open_predictor(
    workspace: "Workspace", bundle: str | None, num_files: int, tell: Callable[[str], None]
) -> "Predictor":
    """Open the champion, or the model of an address; for many files as the server does, and say which engine that is.

    `serve.runtime` holds for both.
    """
    from visionloop.engines import make_opener
    from visionloop.promotion.models import load_approved_model, load_champion, load_model

    if num_files < MANY:
        return load_model(bundle, lambda: workspace) if bundle else load_champion(workspace)
    opened = load_approved_model(bundle, workspace, make_opener(workspace, tell))
    tell(f"answers by {opened.why}")
    return opened.predictor


@dataclass
class Shown:
    """How answers are shown, and what they came to: how often each class was said, why the first bad file has none."""

    width: int
    top: int
    most: int
    tell: Callable[[str], None]
    counts: Counter[str] = field(default_factory=Counter)
    problem: str | None = None
    kept: list[dict[str, Any]] = field(default_factory=list)

    def read(self, answers: Iterable["FilePrediction"], *, keep: bool = False) -> None:
        """Print the first answers and count all; `keep` them as JSON too."""
        for number, answer in enumerate(answers):
            if number == self.most:
                self.tell("...")
            elif number < self.most:
                self.tell("\n".join(describe_answer(answer, self.width, self.top)))
            if answer.prediction is None:
                self.problem = self.problem or answer.error
            else:
                said = answer.prediction.prediction or "no label"
                self.counts["don't know" if answer.prediction.abstained else said] += 1
            if keep:
                found = answer.prediction.to_json() if answer.prediction else {}
                self.kept.append({"path": answer.path, **found, "error": answer.error})


def describe_counts(counts: Counter[str], total: int, most: int = 8) -> str:
    """Return the answers of many files as one line: the commonest classes, and how many files could not be used."""
    parts = [f"{name} {count:,}" for name, count in counts.most_common(most)]
    parts += [f"{len(counts) - most:,} more classes"] if len(counts) > most else []
    bad = total - counts.total()
    return f"{total:,} files: {', '.join(parts) or 'no answer'}" + (f"; {bad:,} could not be used" if bad else "")


def describe_answer(answer: "FilePrediction", width: int, top: int) -> list[str]:
    """Return one answer as lines: the likeliest classes with bars, all that were chosen, or the reason why not.

    Where the model does not know, that is the first line; below it is what it would have said.
    """
    name = _pad(_shorten_path(answer.path), width)
    if answer.prediction is None:
        return [f"{name}  -- {answer.error}"]
    chosen = answer.prediction.labels
    if chosen is None:
        chosen = (answer.prediction.prediction,)
    ranked = sorted(answer.prediction.probabilities.items(), key=lambda kv: -kv[1])
    ranked = [(label, p) for place, (label, p) in enumerate(ranked) if place < top or label in chosen]
    label_width = max(measure_width(label) for label, _ in ranked)
    lines = [] if chosen else [f"{name}  -- no label"]
    if answer.prediction.abstained:
        lines = [f"{name}  ? don't know ({answer.prediction.abstained})"]
    for label, p in ranked:
        mark = "*" if label in chosen else " "
        bar = ("█" * round(p * BAR_CHARS)).ljust(BAR_CHARS, "·")
        lines.append(f"{' ' * width if lines else name}  {mark} {_pad(label, label_width)}  {bar} {p:6.1%}")
    return lines


@app.command()
def explain(
    image: Annotated[Path, typer.Argument(help="An image.")],
    name: Annotated[
        str | None, typer.Option("--class", help="The class that is asked about; default: the answer.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the picture (PNG).")] = Path("explained.png"),
    bundle: Annotated[str | None, typer.Option(help=f"{ADDRESSES}; default: the champion.")] = None,
    *,
    quiet: Quiet = False,
) -> None:
    """Draw which parts of an image hold up the answer: each is covered in turn, and the network is asked again.

    Examples:

      visionloop explain photo.jpg

      visionloop explain photo.jpg --class wolf --out why-no-wolf.png
    """
    from visionloop.cli.pictures import require_png, write_picture
    from visionloop.data.inputs import load_input
    from visionloop.explain import describe_falls, draw_explanation
    from visionloop.explain import explain as run_explain
    from visionloop.promotion.models import load_champion, load_model

    require_png(out, "--out")
    workspace = open_workspace()
    predictor = load_model(bundle, lambda: workspace) if bundle else load_champion(workspace)
    card = predictor.card
    array = load_input(image, str(image), size_hw=card.image_size, resize=card.resize, max_pixels=card.max_pixels)
    with show_waiting("covering part after part", quiet=quiet):
        found = run_explain(predictor, array, name)
    write_picture(out, draw_explanation(array, found, card.classes, f"{image.name}, bundle {predictor.digest[:12]}"))
    print(f"{found.name} {found.probability:.1%}, {describe_falls(found)}; what holds it up is red in {out}")
    say_next(f"`visionloop similar {image}` shows what it learned from that is like it", quiet=quiet)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="champion, a bundle's folder, NAME@champion, NAME@3 or s3://...")],
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    *,
    quiet: Quiet = False,
) -> None:
    """Write a model for people without visionloop: ONNX, classes, example images, and a program of one page.

    Examples:

      visionloop export champion to-the-app-team

      visionloop export models/candidate candidate-1
    """
    from visionloop.promotion.handout import describe_engines, write_handout
    from visionloop.promotion.models import list_approved, load_champion, load_model

    workspace = open_workspace()
    predictor = load_champion(workspace) if model == "champion" else load_model(model, lambda: workspace)
    address = f"{workspace.name}@champion" if model == "champion" else model
    approved = list_approved(predictor, address, workspace)
    with show_waiting(f"writing {folder}", quiet=quiet):
        names = write_handout(predictor, folder, approved)
    print(f"bundle {predictor.digest[:12]} in {folder}: {', '.join(names)}")
    for line in describe_engines(predictor, approved):
        print(line)
    say_next(f"`python {folder}/predict.py --check` tries it", quiet=quiet)


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    bundle: Annotated[str | None, typer.Option(help=f"{ADDRESSES}; default: follow the champion.")] = None,
    check: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="Only try it: a folder, or a digest of the store.")
    ] = None,
    trial: Annotated[
        bool, typer.Option(hidden=True, help="For one asker on this machine: no keys, rate or log.")
    ] = False,
) -> None:
    """Serve the champion over HTTP, and follow the ledger: a promotion or a rollback is taken up without a restart.

    Examples:

      visionloop serve

      curl -F file=@photo.jpg http://127.0.0.1:8000/predict

      visionloop serve --port 0 --bundle models/candidate

      visionloop serve --check models/candidate
    """
    gc.disable()  # nothing of what is imported is garbage: to look for it takes a tenth of the start
    from visionloop.serving.main import run_server

    gc.freeze()
    gc.enable()
    die_with_guardian()
    workspace = open_workspace()
    if check is not None:
        from visionloop.serving.check import check_serving

        number = check_serving(workspace, check)
        print(f"the server answers {number} golden images of {check} as the bundle does")
        say_next("`visionloop register`, then `visionloop promote`")
        return
    run_server(
        workspace,
        host=host,
        port=port,
        bundle=bundle,
        is_trial=trial,
        on_ready=lambda url, engine: print(
            f"serving {workspace.name} on {url} (docs: {url}/docs) by {engine}; Ctrl-C stops", flush=True
        ),
    )


def _describe_numbers(classes: Sequence[str]) -> str:
    from visionloop.data.fonts import describe_numbers

    numbers = describe_numbers(classes)
    return f"; there {numbers}: no font here has these names" if numbers else ""


def _pad(text: str, width: int) -> str:
    return text + " " * (width - measure_width(text))


def _shorten_path(path: str, most: int = 48) -> str:
    return path if len(path) <= most else "…" + path[1 - most :]
