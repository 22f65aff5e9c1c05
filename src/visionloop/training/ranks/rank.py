"""One rank of several: it joins the others, and leads or follows."""

from typing import Any

from visionloop.records import RunNote
from visionloop.training.fit import follow, train
from visionloop.training.job import World, choose_accelerator, count_gpus
from visionloop.training.ranks.world import check_shared_folder, join_world
from visionloop.training.watch import Watcher
from visionloop.workspace import Workspace


def train_as_rank(
    workspace: Workspace, *, world: World, now: str, code_digest: str, watcher: Watcher | None
) -> RunNote | None:
    """Train together with the other ranks: rank 0 leads, and alone returns a note."""
    with join_world(world, choose_accelerator(workspace.params.compute, count_gpus())):
        check_shared_folder(world, workspace.settings.hidden_dir)
        if world.is_first:
            how: dict[str, Any] = {"now": now, "code_digest": code_digest, "watcher": watcher, "world": world}
            return train(workspace, **how)
        follow(workspace, code_digest=code_digest, world=world)
    return None
