"""One rank of several: it joins the others, and leads or follows."""

from typing import Any

from visionloop.params import Params
from visionloop.records import RunNote
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.tracking import Tracking
from visionloop.training.fit import follow, train
from visionloop.training.job import World, choose_accelerator, count_gpus
from visionloop.training.ranks.world import check_shared_folder, join_world
from visionloop.training.watch import Watcher


def train_as_rank(
    settings: Settings,
    params: Params,
    store: ObjectStore,
    tracking: Tracking,
    *,
    world: World,
    now: str,
    code_digest: str,
    watcher: Watcher | None,
) -> RunNote | None:
    """Train together with the other ranks: rank 0 leads, and alone returns a note."""
    with join_world(world, choose_accelerator(params.train, count_gpus())):
        check_shared_folder(world, settings.hidden_dir)
        if world.is_first:
            how: dict[str, Any] = {"now": now, "code_digest": code_digest, "watcher": watcher, "world": world}
            return train(settings, params, store, tracking, **how)
        follow(settings, params, store, tracking, code_digest=code_digest, world=world)
    return None
