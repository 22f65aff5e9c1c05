"""The command `shadow`: try a second model on the requests that come, before anybody depends on it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import Json, app, print_json, say_next
from visionloop.errors import PromotionError
from visionloop.workspace import Workspace, get_now, get_user, open_workspace

if TYPE_CHECKING:
    from visionloop.data.prediction_log import Order
    from visionloop.monitoring.shadow import Comparison, Verdict

shadow_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(shadow_app, name="shadow")

SHOWN = 10


@shadow_app.callback()
def shadow() -> None:
    """Let a second model answer a share of the requests for itself, and compare it with the champion.

    Clients never see its answers. It works when the server is idle, and is dropped when that is busy.

    Examples:

      visionloop shadow start models/candidate

      visionloop shadow report

      visionloop shadow stop
    """


@shadow_app.command("start")
def start(
    model: Annotated[str, typer.Argument(help="A bundle's folder, NAME@3, or a digest.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the answered images.")] = 0.1,
) -> None:
    """Make a model the shadow on all servers of this workspace. It takes the place of the one before.

    Examples:

      visionloop shadow start models/candidate

      visionloop shadow start pets@7 --share 0.5
    """
    from visionloop.bundle import upload_bundle
    from visionloop.data.known_store import check_store
    from visionloop.data.prediction_log import Order, write_order
    from visionloop.errors import SettingsError
    from visionloop.promotion.models import load_champion, load_model

    if not 0 < share <= 1:
        raise SettingsError("--share", f"got {share:g}", "a number above 0, up to 1")
    workspace = open_workspace()
    check_store(workspace)
    champion = load_champion(workspace)
    predictor = load_model(model, lambda: workspace)
    where = f"model {model!r}"
    if predictor.digest == champion.digest:
        raise PromotionError(where, "is the champion", "another model", "Name the one that you want to try.")
    asked, served = ((each.card.task, tuple(each.card.classes)) for each in (predictor, champion))
    if asked != served:
        found = f"is {asked[0]} with {len(asked[1])} classes, and not all as the champion's"
        raise PromotionError(where, found, f"{served[0]} with {', '.join(served[1][:5])}", "Train it on the same ones.")
    if not predictor.bundle.folder.is_dir():
        raise SettingsError(where, "is in another store", "a folder, or one of this store", "Fetch it first.")
    upload_bundle(workspace.store, predictor.bundle)
    order = Order(predictor.digest, share, get_now(), get_user(), model)
    write_order(workspace.store, workspace.name, order)
    print(f"{predictor.digest[:12]} is the shadow, for {share:.0%} of the answered images, within seconds")
    say_next("`visionloop shadow report` compares it with the champion; `visionloop shadow stop` ends it")


@shadow_app.command("stop")
def stop() -> None:
    """End the shadow: servers give its memory back at their next look at the ledger. What it answered stays.

    Examples:

      visionloop shadow stop
    """
    from dataclasses import replace

    from visionloop.data.known_store import check_store
    from visionloop.data.prediction_log import write_order

    workspace = open_workspace()
    check_store(workspace)
    order = _require_order(workspace)
    if order.stopped_at:
        print(f"{order.bundle[:12]} was stopped {order.stopped_at}")
    else:
        write_order(workspace.store, workspace.name, replace(order, stopped_at=get_now()))
        print(f"{order.bundle[:12]} is no shadow any more")
    say_next("`visionloop shadow report`")


@shadow_app.command("report")
def report(as_json: Json = False) -> None:
    """Compare the shadow with the champion: agreement, time, images on which they differ, and by feedback who is right.

    The same paired test as in the gate says better, worse or cannot tell. Each image counts once.

    Examples:

      visionloop shadow report

      visionloop shadow report --json
    """
    from visionloop.monitoring.shadow import load_comparison

    workspace = open_workspace()
    order = _require_order(workspace)
    found = load_comparison(workspace.store, workspace.name, order, workspace.params.gate.alpha)
    if as_json:
        print_json({"shadow": asdict(order), **asdict(found)})
        return
    end = f" to {order.stopped_at}" if order.stopped_at else ""
    print(
        f"shadow {order.bundle[:12]} ({order.model}), {order.share:.0%} of the answers, since {order.started_at}{end}"
    )
    for line in describe(found):
        print(line)
    say_next("`visionloop shadow stop` ends it" if not order.stopped_at else "`visionloop shadow start MODEL`")


def describe(found: "Comparison") -> list[str]:
    """Return a comparison as lines of text."""
    lines = [f"answered      {found.num_answered:,}" + (f"; {found.num_failed:,} failed" if found.num_failed else "")]
    lines += [f"              {problem}" for problem in found.problems[:SHOWN]]
    if found.num_unmatched:
        lines.append(f"left out      {found.num_unmatched:,}: not in the prediction log yet, or of another champion")
    if found.agreement is None:
        return [*lines, "no answers to compare yet: servers look every few seconds, and work when they are idle"]
    low, high = found.agreement
    share = found.num_agreeing / found.num_images
    lines.append(f"agreement     {share:.1%} of {found.num_images:,} images (95 %: {low:.1%} to {high:.1%})")
    for name, times in (("champion", found.champion_ms), ("shadow", found.shadow_ms)):
        if times:
            lines.append(f"network, ms   {times[0]:.1f} (p99 {times[1]:.1f}) {name}")
    for one in found.differences[:SHOWN]:
        kept = "" if one.is_kept else ", not kept"
        lines.append(
            f"differs       {one.image_sha256[:12]}  {one.champion or '(none)'} -> {one.shadow or '(none)'}{kept}"
        )
    if len(found.differences) > SHOWN:
        lines.append(f"              and {len(found.differences) - SHOWN:,} others: --json")
    return [*lines, *describe_verdict(found.labels)]


def describe_verdict(verdict: "Verdict | None") -> list[str]:
    """Return what the labels say."""
    if verdict is None:
        return ["labels        none yet: `visionloop review`, or POST /feedback"]
    shares = f"{verdict.shadow:.1%} right, champion {verdict.champion:.1%}"
    interval = f"{100 * verdict.low:+.1f} to {100 * verdict.high:+.1f} points"
    lines = [f"labels        {verdict.num_labels:,}: shadow {shares} ({interval})", f"verdict       {verdict.verdict}"]
    if verdict.num_more is not None:
        lines[-1] += f": some {verdict.num_more:,} labels more would tell, if the difference is as found"
    elif verdict.verdict == "cannot tell":
        lines[-1] += ": both have as many right so far"
    return lines


def _require_order(workspace: Workspace) -> "Order":
    from visionloop.data.prediction_log import read_order

    order = read_order(workspace.store, workspace.name)
    if order is None:
        todo = "Run `visionloop shadow start models/candidate`."
        raise PromotionError(f"shadow of {workspace.name}", "there was none", "one that was started", todo)
    return order
