"""The command `predict`: answers for images, videos and folders, or a camera that is watched (`cameras.py`)."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionloop.cli.app import ADDRESSES, Json, Quiet, app, print_json, say_next
from visionloop.cli.cameras import StreamWishes, Telling, choose_webhook, find_streams, make_plans, watch_cameras
from visionloop.cli.waiting import make_progress, tell_when_stopped
from visionloop.errors import SettingsError, escape_text
from visionloop.records import measure_width
from visionloop.workspace import open_workspace

if TYPE_CHECKING:
    from visionloop.cli.pictures import AnswerPictures
    from visionloop.params.loop import Webhook
    from visionloop.predict.connection import WatchPlan
    from visionloop.predict.files import FilePrediction, Sampling
    from visionloop.predictor import Predictor
    from visionloop.workspace import Workspace

BAR_CHARS = 20
SHOWN_OF_TABLE = 20
FEW = 8
SHOWN_SEGMENTS = 12
SHOWN_UNUSABLE = 5
SHOWN_CLASSES = 8
LONGEST_PATH = 48
MANY = 500  # images for which the fastest engine is worth looking for
Paths = Annotated[
    list[str] | None, typer.Argument(help="Images, videos, folders, globs in quotes; or streams: rtsp://, /dev/video0.")
]
Out = Annotated[
    Path | None,
    typer.Option(help="Write every answer to a .jsonl, .csv or .parquet file; resumable. Of a stream: .jsonl."),
]
Form = Annotated[str | None, typer.Option(help="kaggle: a .csv of `id` and one column of probabilities a class.")]
Sheet = Annotated[
    Path | None, typer.Option(help="Draw some images with their answers and the likeliest classes, as .png.")
]
Address = Annotated[str | None, typer.Option(help=f"{ADDRESSES}; default: the champion.")]
Top = Annotated[int | None, typer.Option(min=1, help="Classes to show: 3, or 1 of many images.")]
Pictures = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Save each image with its answer there, as .png; none is overwritten."),
]
Every = Annotated[float | None, typer.Option(min=0.04, max=3600, help="Video, stream: seconds to the next frame; 0.5.")]
Smooth = Annotated[
    float | None, typer.Option(min=0, max=3600, help="A change for a shorter time (s) is taken for a flicker; 1.")
]
Seconds = Annotated[float | None, typer.Option(min=0.1, help="Of a stream: end after so long.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Of a stream: end after so many answers.")]
EachFrame = Annotated[bool, typer.Option("--each-frame", help="Of a stream: a line for each answer too.")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="Of a stream: another host that its pieces may be on; repeatable.")
]
Streams = Annotated[bool, typer.Option("--streams", help="Watch the streams of params.yaml `predict.streams`.")]
Hook = Annotated[str | None, typer.Option(metavar="URL", help="Of a stream: POST each event there, as JSON.")]


@app.command()
def predict(
    paths: Paths = None,
    *,
    out: Out = None,
    format: Form = None,
    sheet: Sheet = None,
    bundle: Address = None,
    top: Top = None,
    pictures: Pictures = None,
    every: Every = None,
    smooth: Smooth = None,
    seconds: Seconds = None,
    frames: Frames = None,
    each_frame: EachFrame = False,
    webhook: Hook = None,
    streams: Streams = False,
    host: Hosts = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer for images, videos, folders and globs with the champion, or watch cameras and tell each change.

    Shown are the likeliest classes: `*` is before what is the answer, `?` where the model does not know. A file that
    cannot be used gets its reason. A stream that breaks off is connected to again; Ctrl-C ends it.

    Examples:

      visionloop predict photo.jpg

      visionloop predict "photos/**/*.jpg" --out answers.jsonl

      visionloop predict test/ --out submission.csv --format kaggle

      visionloop predict photos/ --sheet answers.png --pictures answered/

      visionloop predict film.mp4 --every 0.2 --smooth 2 --bundle pets@3

      visionloop predict 'rtsp://admin:${CAM_PASSWORD}@192.168.1.20/stream1'

      visionloop predict gate=rtsp://192.168.1.20/stream1 yard=http://192.168.1.21/video.mjpg

      visionloop predict /dev/video0 --out events.jsonl --seconds 3600 --webhook https://example.com/hook
    """
    if not paths and not streams:
        expected = "images, videos, folders, globs in quotes; or streams: rtsp://, /dev/video0"
        raise SettingsError(
            "visionloop predict", "PATHS is missing", expected, "For example `visionloop predict a.jpg`."
        )
    workspace = open_workspace()
    telling = Telling(out, quiet=quiet, as_json=as_json)
    asked = Asked(make_sampling(workspace, every, smooth), telling, bundle, top)
    section = workspace.params.predict
    wishes = StreamWishes(seconds, frames, each_frame, webhook, streams, tuple(host or ()))
    if named := find_streams(
        paths or (), wishes, section, {"--format": format, "--sheet": sheet, "--pictures": pictures}
    ):
        plans = make_plans(named, asked.sampling, replace(wishes, hosts=(*section.hosts, *wishes.hosts)))
        _watch(workspace, plans, asked, choose_webhook(webhook, section.webhook))
    else:
        _predict_files(workspace, paths or (), asked, FileWishes(format, sheet, pictures))


@dataclass(frozen=True)
class Asked:
    """What is asked of files and streams alike."""

    sampling: "Sampling"
    telling: Telling
    bundle: str | None
    top: int | None


@dataclass(frozen=True)
class FileWishes:
    """What is asked of files alone."""

    format: str | None
    sheet: Path | None
    pictures: Path | None


def _predict_files(workspace: "Workspace", paths: Sequence[str], asked: Asked, wishes: FileWishes) -> None:
    """Answer for files; show the answers, or the first of them and a table."""
    from visionloop.cli.pictures import AnswerPictures, require_image, require_png
    from visionloop.predict.chunks import Cluster, predict_in_chunks
    from visionloop.predict.files import find_images, predict_files
    from visionloop.predict.tables import Table

    out, quiet, as_json = asked.telling.out, asked.telling.quiet, asked.telling.as_json
    table = Table.plan(out, wishes.format)
    require_png(wishes.sheet, "--sheet")
    files = find_images(paths)
    require_image(files, {"--sheet": wishes.sheet, "--pictures": wishes.pictures})
    tell: Callable[[str], None] = (lambda line: None) if as_json else print
    saved = AnswerPictures(wishes.pictures, files, paths) if wishes.pictures else None
    predictor = _open_predictor(workspace, asked.bundle, len(files), tell)
    progress = make_progress("answered", "images", quiet=quiet or as_json or len(files) <= 64)
    width = max(measure_width(_shorten_path(escape_text(str(path)))) for path in files[:SHOWN_OF_TABLE])
    show = Shown(width, asked.top or (3 if len(files) <= FEW else 1), len(files), tell)
    draw = partial(saved.draw, classes=predictor.card.classes) if saved else iter
    if table is None:
        show.read(draw(predict_files(predictor, files, sampling=asked.sampling, on_progress=progress)), keep=as_json)
    else:
        show.most, folder = SHOWN_OF_TABLE, workspace.settings.hidden_dir / "predict"
        with (
            tell_when_stopped(),
            predict_in_chunks(
                predictor,
                files,
                table,
                folder,
                sampling=asked.sampling,
                cluster=Cluster.plan(workspace),
                on_progress=progress,
                tell=tell,
            ) as chunks,
        ):
            show.read(draw(chunks.read()))
            table.write(chunks.read(), predictor)
        rows = table.describe(len(files), len(files) - show.counts.total())
        tell(f"{rows}, of bundle {predictor.digest[:12]}, in {escape_text(str(out))}")
        if late := _list_late(paths, files):
            found = "1 file has come" if len(late) == 1 else f"{len(late):,} files have come"
            tell(f"note: {found} since it began, and no row: {_list_some(late)}; run it again")
    _tell_counts(show, predictor, files, saved, wishes.sheet)
    if as_json:
        print_json({"bundle": predictor.digest, "counts": show.counts, "num_files": len(files), "answers": show.kept})
    _require_answer(show, paths, len(files))
    say_next("`visionloop explain PHOTO` shows why", quiet=quiet or as_json)


def make_sampling(workspace: "Workspace", every: float | None, smooth: float | None) -> "Sampling":
    """Return how videos and streams are looked at: as the options say, else as params.yaml does."""
    from visionloop.predict.files import Sampling

    section = workspace.params.predict
    return Sampling(
        section.every_s if every is None else every,
        section.smooth_s if smooth is None else smooth,
    )


def _watch(workspace: "Workspace", plans: "Sequence[WatchPlan]", asked: Asked, webhook: "Webhook | None") -> None:
    """Watch streams; an address of a video file is answered as one."""
    telling = asked.telling
    tell: Callable[[str], None] = (lambda line: None) if telling.as_json or telling.quiet else print
    predictor = _open_predictor(workspace, asked.bundle, MANY, tell)
    if video := watch_cameras(workspace, predictor, plans, telling, webhook):
        show = Shown(measure_width(video.path), asked.top or 3, 1, tell)
        show.read([video], keep=telling.as_json)
        if telling.as_json:
            print_json({"bundle": predictor.digest, "counts": show.counts, "num_files": 1, "answers": show.kept})
        _require_answer(show, [video.path], 1)


def _list_late(paths: Sequence[str], files: "Sequence[Path]") -> list[str]:
    """Return the files that came after those that were asked about were listed. A path that is gone has none."""
    from visionloop.errors import SourceError
    from visionloop.predict.files import find_images

    with contextlib.suppress(SourceError):
        known = set(files)
        return [escape_text(str(one)) for one in find_images(paths, may_be_none=True) if one not in known]
    return []


def _require_answer(show: "Shown", paths: Sequence[str], number: int) -> None:
    from visionloop.errors import SourceError, shorten

    if not show.counts:
        found = f"none of {number:,} could be used: {show.problem}"
        raise SourceError(shorten(paths), found, "", "Name images that can be read.")


def _tell_counts(
    show: "Shown", predictor: "Predictor", files: Sequence[Path], saved: "AnswerPictures | None", sheet: Path | None
) -> None:
    """Tell what the answers came to and where their pictures are; draw the sheet."""
    from visionloop.cli.pictures import SHEET_IMAGES, draw_sheet, write_picture

    numbers = _describe_numbers(predictor.card.classes)
    if len(files) > 1:
        show.tell(
            describe_counts(show.counts, len(files), bad=[show.unusable[one][0] for one in sorted(show.unusable)])
        )
    if saved and show.counts:
        show.tell(f"{saved.number:,} pictures in {saved.folder}{numbers}")
    if sheet and show.counts:
        usable = [path for number, path in enumerate(files) if number not in show.unusable]
        write_picture(sheet, draw_sheet(predictor, usable, show.describe_unusable()))
        amount = "all" if len(usable) <= SHEET_IMAGES else "some"
        show.tell(f"{amount} of them in {sheet}{numbers}")


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
    if opened.had_choice:
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
    unusable: dict[int, tuple[str, str | None]] = field(default_factory=dict)  # path, and why not
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
                self.unusable[number] = answer.shown, answer.error
            else:
                said = answer.prediction.prediction or "no label"
                self.counts["don't know" if answer.prediction.abstained else said] += 1
            if keep:
                found = answer.prediction.to_json() if answer.prediction else {}
                self.kept.append({"path": answer.path, **found, **(answer.video or {}), "error": answer.error})

    def describe_unusable(self) -> list[str]:
        """Return which files could not be used, and why, as lines: the first of them."""
        number = len(self.unusable)
        lines = [f"{path}: {error}" for path, error in list(self.unusable.values())[:SHOWN_UNUSABLE]]
        more = [f"... and {number - len(lines):,} more"] if number > len(lines) else []
        return [f"{number:,} could not be used:", *lines, *more] if lines else []


def describe_counts(counts: Counter[str], total: int, bad: Sequence[str] = ()) -> str:
    """Return the answers of many files as one line: the commonest classes, and which files could not be used."""
    parts = [f"{name} {count:,}" for name, count in counts.most_common(SHOWN_CLASSES)]
    parts += [f"{len(counts) - SHOWN_CLASSES:,} more classes"] if len(counts) > SHOWN_CLASSES else []
    told = f"{total:,} files: {', '.join(parts) or 'no answer'}"
    return f"{told}; {len(bad):,} could not be used: {_list_some(bad)}" if bad else told


def describe_answer(answer: "FilePrediction", width: int, top: int) -> list[str]:
    """Return one answer as lines: the likeliest classes with bars, all that were chosen, or the reason why not.

    Where the model does not know, that is the first line; below it is what it would have said.
    """
    name = _pad(_shorten_path(answer.shown), width)
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
    return [*lines, *(f"{' ' * width}    {text}" for text in describe_video(answer.video))]


def describe_video(video: Mapping[str, Any] | None) -> list[str]:
    """Return what a video shows when, a line each; then what is to be known of the reading."""
    if video is None:
        return []
    lines = []
    for part in video["segments"][:SHOWN_SEGMENTS]:
        said = part["prediction"] or "no label"
        said = f"? don't know ({part['abstained']})" if part["abstained"] else f"{said} {part['confidence']:.0%}"
        lines.append(f"{_format_time(part['start_s'])} to {_format_time(part['end_s'])}  {said}")
    more = len(video["segments"]) - SHOWN_SEGMENTS
    return [*lines, *([f"... {more:,} more parts"] if more > 0 else []), *(f"note: it {one}" for one in video["notes"])]


def _list_some(paths: Sequence[str]) -> str:
    more = [f"and {len(paths) - SHOWN_UNUSABLE:,} more"] if len(paths) > SHOWN_UNUSABLE else []
    return ", ".join([*map(_shorten_path, paths[:SHOWN_UNUSABLE]), *more])


def _format_time(seconds: float) -> str:
    """Return a time in a video: 1:02:03.5."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def _describe_numbers(classes: Sequence[str]) -> str:
    from visionloop.data.fonts import describe_numbers

    numbers = describe_numbers(classes)
    return f"; there {numbers}: no font here has these names" if numbers else ""


def _pad(text: str, width: int) -> str:
    return text + " " * (width - measure_width(text))


def _shorten_path(path: str) -> str:
    return path if len(path) <= LONGEST_PATH else "…" + path[1 - LONGEST_PATH :]
