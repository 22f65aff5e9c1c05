"""Commands about the workspace itself: new, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from visionloop.cli.app import app


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    example: Annotated[
        str, typer.Option(help="cats-and-dogs, digits, dog-breeds, fourteen-classes, horses-or-humans.")
    ] = "digits",
    name: Annotated[str | None, typer.Option(help="Name of dataset, model and experiment.")] = None,
) -> None:
    """Make a workspace of your own: params.yaml, dvc.yaml, git and dvc ready.

    Examples:

      visionloop new ~/pets --example horses-or-humans --name pets

      visionloop new /tmp/digits
    """
    from visionloop.workspace import make_workspace

    home = make_workspace(folder, example, name=name)
    print(f"made {home} from the example {example}")
    readme = home / "README.md"
    if readme.is_file():
        print(f"read {readme} for the next step; params.yaml holds what you can change")


@app.command()
def doctor() -> None:
    """Check versions, store, MLflow, disk, processor, GPU, and the ledger against MLflow's alias; say what to do.

    Examples:

      visionloop doctor
    """
    from visionloop.cli.context import open_context
    from visionloop.doctor import examine

    context = open_context()
    findings = examine(context.settings, context.params, context.store, context.tracking)
    width = max(len(f.subject) for f in findings)
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'LOOK'}  {finding.subject:<{width}}  {finding.found}")
        if not finding.ok:
            print(f"      {'':<{width}}  -> {finding.todo}")
    if any(not f.ok for f in findings):
        raise typer.Exit(2)
