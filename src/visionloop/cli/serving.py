"""Commands about what answers: explain, export, serve, and the keys of the server."""

import gc
import os
from pathlib import Path
from typing import Annotated

import typer

from visionloop.cli.app import ADDRESSES, Json, Quiet, app, print_json, say, say_next
from visionloop.cli.stages import die_with_guardian
from visionloop.cli.waiting import show_waiting
from visionloop.workspace import get_now, get_user, open_workspace

keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")


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
    say(f"{found.name} {found.probability:.1%}, {describe_falls(found)}; what holds it up is red in {out}")
    say_next(f"`visionloop similar {image}` shows what it learned from that is like it", quiet=quiet)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="champion, candidate, a bundle's folder, NAME@champion, NAME@3 or s3://...")
    ],
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
    say(f"bundle {predictor.digest[:12]} in {folder}: {', '.join(names)}")
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


@keys_app.callback()
def keys() -> None:
    """Make, list and revoke the keys of the server. Without any, all who reach the server may ask it.

    Examples:

      visionloop keys new --role predict --name camera-3

      visionloop keys list

      visionloop keys revoke camera-3
    """


@keys_app.command("new")
def make_key(
    name: Annotated[str, typer.Option(help="Whose it is, as it will stand in the log.")],
    role: Annotated[list[str], typer.Option(help="predict, feedback or admin; give it several times for several.")],
    rate: Annotated[
        float | None, typer.Option(help="Images a second at most; default: serve.rate_per_s of params.yaml.")
    ] = None,
) -> None:
    """Make a key and print it, this once: only its sha256 is kept.

    Examples:

      visionloop keys new --role predict --name camera-3

      visionloop keys new --role predict --role feedback --name desk --rate 5
    """
    from visionloop.serving.keys import add_key

    text = add_key(_find_file(), name=name, roles=role, rate_per_s=rate, now=get_now(), by=get_user())
    print(text)


@keys_app.command("list")
def list_keys(as_json: Json = False) -> None:
    """List all keys with their roles, also the revoked ones. The keys themselves are known to their holders alone.

    Examples:

      visionloop keys list

      visionloop keys list --json
    """
    from visionloop.serving.keys import read_keys

    found = read_keys(path := _find_file())
    if as_json:
        listed = [{name: value for name, value in vars(key).items() if name != "sha256"} for key in found]
        print_json({"keys": listed, "open_to_all": not path.exists()})
        return
    for key in found:
        rate = "" if key.rate_per_s is None else f"  {key.rate_per_s:g}/s"
        state = f"revoked {key.revoked_at}" if key.revoked_at else "valid"
        print(f"{key.name:<20} {','.join(key.roles):<16}  made {key.made_at} by {key.made_by}  {state}{rate}")
    if not path.exists():
        print("no key was made: all who reach the server may ask it")
    say_next("`visionloop keys new --role predict --name WHO`, or `visionloop keys revoke WHO`")


@keys_app.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="Its name, as `visionloop keys list` shows it.")]) -> None:
    """Make a key invalid for ever. Servers that run refuse it from their next request on.

    Examples:

      visionloop keys revoke camera-3
    """
    from visionloop.serving.keys import revoke_key

    revoke_key(_find_file(), name, now=get_now())
    print(f"the key {name} is revoked")
    say_next("`visionloop keys list`")


def _find_file() -> Path:
    from visionloop.settings import load_settings

    return load_settings(os.environ).keys_path
