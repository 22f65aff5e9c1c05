"""Commands about embeddings: the stage embed, and what can be seen through them: similar, map, suspects."""

import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say, say_next
from visionloop.cli.progress import print_line
from visionloop.cli.review import By, serve_page
from visionloop.cli.stages import close_stage, open_stage
from visionloop.cli.waiting import make_progress, show_waiting
from visionloop.errors import SettingsError
from visionloop.workspace import Workspace, get_user, open_workspace

if TYPE_CHECKING:
    from visionloop.features.album import Album
    from visionloop.features.map import Method
    from visionloop.features.neighbours import Agreement
    from visionloop.features.similar import QueryImage, SimilarImage
    from visionloop.features.suspects import Suspect

EncoderName = StrEnum("EncoderName", ("auto", "candidate", "champion", "params"))
MethodName = StrEnum("MethodName", ("auto", "pca", "tsne"))
EncoderOption = Annotated[
    EncoderName,
    typer.Option(
        "--encoder",
        help="Whose embeddings: the candidate's, the champion's, or those of train.backbone with train.weights.",
    ),
]
SHOWN = 10
CORRECT = "name the file in `ingest.corrections` of params.yaml, then `visionloop ingest`"
NONE_FOUND = "`visionloop train`, or a look at other images: `visionloop datasets show`"
KEEP = "Keep or remove it, or name another folder: `--out DIR`."


@app.command()
def embed(
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.parquet", help="Into this file instead, with path, labels, side and sha256."),
    ] = None,
    encoder: EncoderOption = EncoderName.auto,
    *,
    quiet: Quiet = False,
) -> None:
    """Write the embeddings of data/prepared into features/; what was ever computed comes from the embedding table.

    Does nothing unless train.way is frozen or knn. Stopped or killed, the same command goes on from the last batch.

    With --out it writes a table for other tools, whatever train.way is, and leaves features/ as it is. A file of an
    earlier --out is replaced, any other is not. --encoder is for --out.

    Examples:

      visionloop embed

      dvc repro embed

      visionloop embed --out vectors.parquet --encoder champion
    """
    if out is not None:
        _export_embeddings(out.expanduser(), encoder, quiet=quiet)
        return
    if encoder is not EncoderName.auto:
        found = f"got {encoder.value} without --out"
        raise SettingsError(
            "--encoder", found, "--out FILE.parquet with it", "features/ always holds those of params.yaml."
        )
    from visionloop.features.embed import embed as run_embed

    started = time.perf_counter()
    stage = open_stage("embed")
    done = run_embed(stage.workspace, tell=_choose_tell(quiet), on_progress=_make_progress(quiet))
    if done.facts is None:
        print(f"nothing to embed: `train.way: {stage.workspace.params.train.way}` learns from pixels")
    else:
        known, seconds = done.num_images - done.num_computed, time.perf_counter() - started
        print(
            f"features holds {done.num_images:,} embeddings: "
            f"{known:,} from the table, {done.num_computed:,} computed, {seconds:.1f} s"
        )
    close_stage(stage)
    say_next("`visionloop train`", quiet=quiet)


@app.command()
def similar(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files, or sha256 of images of the dataset.")],
    k: Annotated[int, typer.Option("--k", min=1, max=1000, help="How many matches of each.")] = 8,
    encoder: EncoderOption = EncoderName.auto,
    out: Annotated[Path | None, typer.Option(help="Where to write the picture (PNG).")] = None,
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find the images of the prepared dataset that are most like a given one, and draw them.

    Without --out the picture is .visionloop/features/similar-IMAGE.png; earlier ones stay.

    Of 50,000 images or more the first question keeps their vectors in .visionloop/features/vectors (2.6 GB for a
    million of 512 numbers), and the next ones take seconds. The answers are exact either way. The file is made anew
    where it is of other images or another encoder; it may be removed.

    Examples:

      visionloop similar photo.jpg

      visionloop similar 3f786850e387 --k 20 --encoder champion
    """
    from visionloop.cli.pictures import require_place, write_picture
    from visionloop.features.album import load_album_of_few
    from visionloop.features.similar import ask, check_query, describe_for_machines, draw_similar

    require_place(out, "--out")
    max_pixels = open_workspace().params.ingest.max_pixels
    for text in images:
        check_query(text, max_pixels=max_pixels)
    workspace, load = _open_encoder(encoder, quiet=quiet or as_json)
    answered = ask(lambda: load(load_album_of_few), images, k, max_pixels=max_pixels)
    album, queries, found = answered.album, answered.queries, answered.found
    if as_json:
        print_json(describe_for_machines(album, queries, found))
    else:
        for query, matches in zip(queries, found, strict=True):
            for line in _describe_matches(album, query, matches):
                print(line)
    if out or not as_json:
        png = draw_similar(album, queries, found)
        if out:
            write_picture(out, png)
        path = out or _keep_similar(workspace, images[0], png)
        if not as_json:
            say(f"look at {path}")
    say_next("`visionloop lineage SHA256`: where one of them came from, which models used it", quiet=quiet or as_json)


@app.command("map")
def draw_map(
    out: Annotated[Path | None, typer.Option(help="Where to write the page (HTML).")] = None,
    method: Annotated[MethodName, typer.Option(help="How places are found; auto is t-SNE.")] = MethodName.auto,
    encoder: EncoderOption = EncoderName.auto,
    thumbnails: Annotated[int, typer.Option(min=0, max=100_000, help="At most so many; 1.5 KB each.")] = 4000,
    *,
    quiet: Quiet = False,
) -> None:
    """Draw the prepared dataset as a map: a page to hover, zoom and filter, in which like images lie together.

    The page is one file and needs no network. Whoever gets it has small pictures of the images.

    Examples:

      visionloop map

      visionloop map --out pets.html --method pca --encoder params
    """
    from visionloop.cli.pictures import require_place, write_picture
    from visionloop.features.map import make_map, project

    require_place(out, "--out")
    workspace, album = _open_album(encoder, quiet=quiet)
    number = len(album.records)
    with show_waiting(f"placing {number:,} images", quiet=quiet):
        place_n2, words = project(album.embedding_nd, cast("Method", method.value))
    progress = make_progress("drawn", "thumbnails", quiet=quiet, only_slow=True)
    path = out or workspace.settings.hidden_dir / "features" / "map.html"
    write_picture(path, make_map(album, place_n2, words, num_thumbnails=thumbnails, on_progress=progress).encode())
    if thumbnails < number:
        print(f"{thumbnails:,} of {number:,} have a thumbnail (--thumbnails)")
    say(f"look at {path}")
    say_next("`visionloop suspects` lists the labels that do not fit their neighbours", quiet=quiet)


@app.command()
def suspects(
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many to show and write.")] = 50,
    neighbours: Annotated[int, typer.Option("--k", min=1, max=1000, help="How many neighbours vote.")] = 10,
    encoder: EncoderOption = EncoderName.auto,
    out: Annotated[Path | None, typer.Option(help="A folder; default: suspects, in the workspace.")] = None,
    *,
    serve: Annotated[bool, typer.Option("--serve", help="Ask on the page of `review`, and write no file.")] = False,
    by: By = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find labels that are probably wrong: those against which the nearest other images vote.

    Writes suspects.png to look at, and corrections.csv to edit: remove the lines where the label was right, name the
    file in `ingest.corrections`, and ingest. A network that learned from wrong labels may agree with them: an encoder
    with pretrained weights (--encoder params) sees more. An encoder whose neighbours agree with the labels no more than
    chance does is refused, and nothing is written.

    With --serve a page asks which label is right: `visionloop review --accept`, then `ingest` with `- kind: review`.
    With --json no file is written unless --out names a folder.

    Examples:

      visionloop suspects

      visionloop suspects --serve --by ann

      visionloop suspects --top 200 --encoder params --out review
    """
    from visionloop.cli.pictures import write_picture
    from visionloop.features.suspects import describe_for_machines, draw_suspects, encode_corrections, find_suspects
    from visionloop.monitoring.ask import ask_about, find_answered

    workspace, album = _open_album(encoder, quiet=quiet or as_json)
    folder = out or workspace.settings.home / "suspects"
    corrections = folder / "corrections.csv"
    writes = not serve and (out is not None or not as_json)
    if corrections.exists() and writes:
        raise SettingsError(str(corrections), "is there already, perhaps edited", "a folder without it", KEEP)
    with show_waiting(f"asking the neighbours of {len(album.records):,} images", quiet=quiet or as_json) as tell:
        found, agreement = find_suspects(album, neighbours, on_progress=_count_compared(tell, quiet or as_json))
    answered, number = find_answered(workspace), len(found)
    found = [one for one in found if album.prepared.sha256_n[one.row] not in answered]
    shown = found[:top]
    if as_json:
        counts = {"num_images": len(album.records), "num_found": len(found), "num_answered": number - len(found)}
        print_json({**describe_for_machines(album, agreement, shown), **counts})
    else:
        head = f"{len(found):,} of {len(album.records):,} images have a label that their nearest {neighbours} doubt"
        lines = [*_describe_agreement(album, agreement, number - len(found)), head, *_describe_suspects(album, shown)]
        print("\n".join(lines))
    if shown and serve:
        serve_page(workspace, ask_about(workspace, album, shown, now=datetime.now(UTC)), by=by or get_user())
    elif shown and writes:
        write_picture(folder / "suspects.png", draw_suspects(album, shown, len(found)))
        write_picture(corrections, encode_corrections(album, shown).encode())
        for line in [] if as_json else _describe_files(folder):
            print(line)
    if not serve:  # the page says what comes after it
        say_next(CORRECT if shown else NONE_FOUND, quiet=quiet or as_json)


def _export_embeddings(path: Path, encoder: EncoderName, *, quiet: bool) -> None:
    from visionloop.features.album import check_target, write_embeddings

    check_target(path)
    _, album = _open_album(encoder, quiet=quiet)
    write_embeddings(album, path)
    number, size = album.embedding_nd.shape
    say(f"{path} holds {number:,} embeddings of {size:,} numbers: path, labels, side, sha256, vector")
    say_next("`visionloop map` draws them, `visionloop suspects` asks them about the labels", quiet=quiet)


def _open_album(name: EncoderName, *, quiet: bool = False) -> "tuple[Workspace, Album]":
    """Open the workspace, its prepared data and an encoder; embed what the table does not have."""
    from visionloop.features.album import load_album

    workspace, load = _open_encoder(name, quiet=quiet)
    return workspace, load(load_album)


def _open_encoder(name: EncoderName, *, quiet: bool) -> "tuple[Workspace, Callable[[Callable[..., Album]], Album]]":
    """Open the workspace, its prepared data and an encoder. Return what loads the album, by one of the ways."""
    from visionloop.data.shards import load_prepared
    from visionloop.features.album import choose_encoder
    from visionloop.features.encoder import describe_weights
    from visionloop.promotion.models import fetch_champion

    workspace = open_workspace()
    prepared = load_prepared(workspace.settings.prepared_dir)
    encoder = choose_encoder(workspace, prepared, name.value, fetch_champion)
    if not quiet:
        print(f"encoder: {encoder.facts.describe()}", flush=True)
        if encoder.facts.source == "params" and (warning := describe_weights(workspace.params.train)):
            print(warning)
    return workspace, lambda load: load(
        workspace,
        prepared,
        encoder,
        batch_size=workspace.params.embed.batch_size,
        tell=_choose_tell(quiet),
        on_progress=_make_progress(quiet),
    )


def _keep_similar(workspace: Workspace, image: str, png: bytes) -> Path:
    """Keep a picture under the name of the image that was asked about; `forget` knows these names."""
    from visionloop.cli.pictures import write_new_picture

    folder = workspace.settings.hidden_dir / "features"
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w-]+", "-", Path(image).stem)
    return write_new_picture(folder, f"similar-{stem}", png)[0]


def _describe_matches(album: "Album", query: "QueryImage", matches: "list[SimilarImage]") -> list[str]:
    from visionloop.words import cut, fit

    lines = [f"{fit(query.name)}:"]
    for match in matches:
        record = album.records[match.row]
        same = "  the same file" if match.is_same else ""
        lines.append(
            f"  {match.distance:.4f}  {record.side:<5}  {cut(album.describe_labels(match.row)):<20}"
            f"  {record.sha256[:12]}  {fit(album.get_origin(match.row), 60)}{same}"
        )
    return lines


def _describe_files(folder: Path) -> list[str]:
    return [
        f"look at {folder / 'suspects.png'}",
        f"edit {folder / 'corrections.csv'}: remove the lines where the label was right",
    ]


def _describe_agreement(album: "Album", agreement: "Agreement | None", num_answered: int) -> list[str]:
    from visionloop.features.suspects import advise

    lines = [agreement.describe()] if agreement else []
    if agreement and agreement.is_weak:
        lines.append(f"that is weak: many doubts will be the encoder's own errors. {advise(album.encoder)}")
    if num_answered:
        lines.append(f"{num_answered:,} more have an answer of a person already")
    return lines


def _describe_suspects(album: "Album", suspects: "Sequence[Suspect]") -> list[str]:
    from visionloop.words import cut, fit

    lines = [
        f"  {s.score:.2f}  {album.records[s.row].side:<5}  {album.records[s.row].sha256[:12]}"
        f"  {cut(s.old or '(no label)')} -> {cut(s.new or '(remove)')}  {fit(album.get_origin(s.row), 60)}"
        for s in suspects[:SHOWN]
    ]
    return [*lines, *([f"  and {len(suspects) - SHOWN:,} more"] if len(suspects) > SHOWN else [])]


def _count_compared(tell: Callable[[str], None], quiet: bool) -> Callable[[int, int], None]:
    from visionloop.words import make_log_progress

    return make_log_progress("compared", "images", (lambda line: None) if quiet else tell)


def _choose_tell(quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else print_line


def _make_progress(quiet: bool) -> Callable[[int, int], None]:
    """Show progress only where there is something to wait for."""
    show = make_progress("embedded", "images", quiet=quiet)
    began = False

    def show_if_waiting(done: int, total: int) -> None:
        nonlocal began
        began = began or done < total
        if began:
            show(done, total)

    return show_if_waiting
