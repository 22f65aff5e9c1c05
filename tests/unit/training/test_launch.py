"""Where a training runs: decided from params, the variables of a launcher and the GPUs that are there. Pure."""

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visionloop.errors import BusyError, ParamsError, SettingsError, TrainingError, VisionLoopError
from visionloop.params import Compute, Params, make_params
from visionloop.training.ranks.launch import LaunchPlan, describe_launch, is_ours, plan_launch
from visionloop.training.ranks.ray import Shape, choose_shape
from visionloop.training.ranks.world import (
    PeerLost,
    World,
    choose_accelerator,
    explain_failures,
    gather_rows,
    is_peer_failure,
    make_rank_error,
    read_world,
)

TORCHRUN = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def make_asked(**keys: Any) -> Params:
    """Return params with some keys of `train` and `compute`."""
    compute = {key: keys.pop(key) for key in set(keys) & set(Compute.model_fields)}
    return make_params({"name": "pets", "train": keys, "compute": compute})


@pytest.mark.parametrize(
    ("section", "num_gpus", "plan"),
    [
        ({}, 0, LaunchPlan("here")),
        ({}, 1, LaunchPlan("here")),
        ({}, 4, LaunchPlan("ddp", 4)),
        ({"accelerator": "cpu"}, 4, LaunchPlan("here")),
        ({"devices": 1}, 4, LaunchPlan("here")),
        ({"devices": 2}, 4, LaunchPlan("ddp", 2)),
        ({"devices": 2}, 0, LaunchPlan("ddp", 2)),
        ({"batch_size": 3}, 8, LaunchPlan("ddp", 3)),
        ({"way": "knn"}, 8, LaunchPlan("here")),
        ({"way": "frozen"}, 8, LaunchPlan("here")),
        ({"strategy": "ray"}, 0, LaunchPlan("ray", None, 1)),
        ({"strategy": "ray", "devices": 2, "num_nodes": 3}, 0, LaunchPlan("ray", 2, 3)),
    ],
)
def test_a_process_alone_plans_by_params_and_gpus(section: dict[str, Any], num_gpus: int, plan: LaunchPlan) -> None:
    assert plan_launch(make_asked(**section), World(), num_gpus) == plan


def test_a_placement_is_told_in_words() -> None:
    assert describe_launch(LaunchPlan("here")) == "in one process"
    assert describe_launch(LaunchPlan("ddp", 4)) == "in 4 processes"
    assert describe_launch(LaunchPlan("ray", None, 2)) == "in workers of Ray Train (2 nodes)"
    assert describe_launch(LaunchPlan("ray", 4, 2)) == "in workers of Ray Train (4 a node, 2 nodes)"


def test_a_rank_of_torchrun_takes_part() -> None:
    world = World(rank=5, size=8, local_rank=1, local_size=4)
    assert plan_launch(make_asked(devices=4, num_nodes=2), world, 4) == LaunchPlan("rank", 4, 2)
    assert plan_launch(make_asked(), world, 0) == LaunchPlan("rank", 4, 2)


@pytest.mark.parametrize(
    ("section", "world", "num_gpus", "line"),
    [
        (
            {"accelerator": "gpu"},
            World(),
            0,
            r"compute\.accelerator: got 'gpu', and torch .* sees none on this machine; exp",
        ),
        ({"devices": 3}, World(), 2, r"compute\.devices: got 3; expected at most the 2 GPUs of this machine, or `acc"),
        (
            {"num_nodes": 2},
            World(),
            0,
            r"compute\.num_nodes: got 2, and this process was not started by torchrun; .*Run `tor",
        ),
        (
            {"devices": 64},
            World(),
            0,
            r"train\.batch_size: got 32 for 64 processes; expected one image or more for each",
        ),
        ({"batch_size": 4}, World(0, 8, 0, 8), 0, r"train\.batch_size: got 4 for 8 processes"),
        ({"strategy": "ray"}, World(0, 2, 0, 2), 0, r"compute\.strategy: got 'ray' under torchrun"),
        ({"devices": 4}, World(0, 2, 0, 2), 0, r"compute\.devices: got 4 x 1 nodes in a world of 2"),
        ({"way": "frozen", "devices": 2}, World(), 0, r"train\.way: got 'frozen' in 2 processes; expected one"),
        ({"way": "knn"}, World(0, 2, 0, 2), 0, r"train\.way: got 'knn' in 2 processes"),
    ],
)
def test_what_cannot_run_is_refused(section: dict[str, Any], world: World, num_gpus: int, line: str) -> None:
    with pytest.raises(ParamsError, match=line) as caught:
        plan_launch(make_asked(**section), world, num_gpus)
    assert caught.value.exit_code == 2


def test_the_world_is_what_torchrun_says() -> None:
    assert read_world({}) == World()
    assert read_world({"RANK": "1"}) == World()
    env = {**TORCHRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert read_world(env) == World(rank=5, size=8, local_rank=1, local_size=4)
    assert not read_world(env).is_first
    on_ray = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert read_world(on_ray, on_ray=True) == World(0, 2, 0, 1, on_ray=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "2"},
        {"RANK": "-1"},
        {"RANK": "one"},
        {"WORLD_SIZE": "0"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "3"},
        {"WORLD_SIZE": "3"},
        {"MASTER_ADDR": ""},
        {"MASTER_PORT": ""},
    ],
)
def test_variables_that_contradict_each_other_are_refused(wrong: dict[str, str]) -> None:
    env = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert read_world(env).size == 2
    with pytest.raises(
        SettingsError, match=r"environment: has RANK=.*; expected RANK < WORLD_SIZE.*Start with torchrun"
    ):
        read_world({**env, **wrong})


def make_failure(
    exitcode: int, *, timestamp: int = 100, error: VisionLoopError | None = None, message: str | None = None
) -> Any:
    data: dict[str, Any] = {"message": "<NONE>"}
    if error:
        parts = [type(error).__name__, error.where, error.found, error.expected, error.todo]
        data = {"message": {"message": str(error)}, "visionloop": parts}
    if message:
        data = {"message": {"message": message}}
    name = signal.Signals(-exitcode).name if exitcode < 0 else "<N/A>"
    return SimpleNamespace(
        exitcode=exitcode, timestamp=timestamp, pid=4242, error_file_data=data, signal_name=lambda: name
    )


def test_the_rank_that_was_killed_is_named_not_those_that_lost_it() -> None:
    lost = PeerLost("rank 0 of 3", "lost another rank (reset by peer)")
    failures = {
        0: make_failure(2, timestamp=99, error=lost),
        1: make_failure(-9, timestamp=100),
        2: make_failure(-15, timestamp=98),
    }
    error = explain_failures(failures, 3)
    assert type(error) is TrainingError
    assert str(error).startswith("rank 1 of 3: was killed by SIGKILL (process 4242); expected all to go on. The system")
    assert str(error).endswith("The same command goes on from the last finished epoch.")


def test_the_first_error_of_a_rank_comes_back_as_it_was_raised() -> None:
    first = BusyError("stage train", "is running in another process", "one at a time", "Wait for it, or stop it.")
    failures = {
        0: make_failure(2, timestamp=7, error=first),
        1: make_failure(2, timestamp=8, error=TrainingError("x", "y")),
    }
    error = explain_failures(failures, 2)
    assert type(error) is BusyError
    assert str(error) == str(first)


def test_a_bug_in_a_rank_is_told_with_its_exit_code() -> None:
    error = explain_failures({1: make_failure(1, message="KeyError: 'x'")}, 2)
    assert str(error).startswith(
        "rank 1 of 2: ended with exit code 1: KeyError: 'x'; expected 0. Look at what it printed"
    )
    assert "ended with exit code 3; expected 0" in str(explain_failures({0: make_failure(3)}, 2))


def test_when_all_only_lost_each_other_one_says_so() -> None:
    lost = PeerLost("rank 1 of 2", "lost another rank (timed out)")
    assert str(explain_failures({1: make_failure(2, error=lost)}, 2)) == "rank 1 of 2: lost another rank (timed out)."


def test_a_broken_connection_is_a_consequence() -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer")
    wrapped = TrainingError("train", "torch failed (...)")
    wrapped.__cause__ = gloo
    assert is_peer_failure(gloo)
    assert is_peer_failure(wrapped)
    assert not is_peer_failure(RuntimeError("shapes do not fit"))
    assert not is_peer_failure(TrainingError("MLflow", "Connection reset by peer"))
    lost = make_rank_error(World(1, 2, 1, 2), wrapped)
    assert isinstance(lost, PeerLost)
    assert "\n" not in str(lost)


def test_an_error_of_another_rank_names_it_and_keeps_its_kind() -> None:
    error = ParamsError("params.yaml x", "got 1", "2", "Edit.")
    assert make_rank_error(World(0, 2, 0, 2), error) is error
    other = make_rank_error(World(1, 2, 1, 2), error)
    assert type(other) is ParamsError
    assert str(other).startswith("rank 1 of 2 on ")
    assert str(other).endswith(", params.yaml x: got 1; expected 2. Edit.")
    bug = KeyError("x")
    assert make_rank_error(World(1, 2, 1, 2), bug) is bug


def test_a_rank_of_ours_leaves_its_error_in_the_file_and_is_quiet(tmp_path: Path) -> None:
    from visionloop.training.ranks.launch import _report_failure

    env = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"), "TORCHELASTIC_RUN_ID": "visionloop-1"}
    assert is_ours(env)
    assert not is_ours({"TORCHELASTIC_RUN_ID": "none"})
    with pytest.raises(SystemExit) as caught, _report_failure(World(0, 2, 0, 2), env):
        raise ParamsError("params.yaml x", "got 1", "2", "Edit.")
    assert caught.value.code == 2
    value = json.loads((tmp_path / "error.json").read_text())
    assert value["visionloop"] == ["ParamsError", "params.yaml x", "got 1", "2", "Edit."]
    assert abs(int(value["message"]["extraInfo"]["timestamp"]) - time.time()) < 10
    with pytest.raises(ParamsError), _report_failure(World(0, 2, 0, 2), {"TORCHELASTIC_RUN_ID": "none"}):
        raise ParamsError("params.yaml x", "got 1", "2", "Edit.")


NODES = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 6.0, "GPU": 2.0}, {"memory": 1.0}]


@pytest.mark.parametrize(
    ("section", "devices", "nodes", "shape"),
    [
        ({}, None, NODES, Shape(devices=4, num_nodes=1, cpus=1, on_gpu=True)),
        ({"num_nodes": 2}, None, NODES, Shape(devices=2, num_nodes=2, cpus=3, on_gpu=True)),
        ({"accelerator": "cpu"}, None, NODES, Shape(devices=1, num_nodes=1, cpus=6, on_gpu=False)),
        ({"accelerator": "cpu", "num_nodes": 2}, 2, NODES, Shape(devices=2, num_nodes=2, cpus=3, on_gpu=False)),
        ({}, 2, [{"CPU": 2.0}], Shape(devices=2, num_nodes=1, cpus=1, on_gpu=False)),
    ],
)
def test_workers_fit_the_cluster(section: dict[str, Any], devices: int | None, nodes: Any, shape: Shape) -> None:
    assert choose_shape(make_asked(**section), devices, nodes) == shape


@pytest.mark.parametrize(
    ("section", "devices", "nodes", "line"),
    [
        (
            {},
            4,
            [{"CPU": 2.0}],
            "got 4 on 1 nodes, and the Ray cluster has 1 nodes with 2 cores and 0 GPUs; expected a core",
        ),
        ({"accelerator": "gpu"}, None, [{"CPU": 2.0}], "got 1 on 1 nodes, .*expected a GPU for each of the 1 workers"),
        (
            {"num_nodes": 4},
            2,
            NODES,
            "got 2 on 4 nodes, .* 14 cores and 6 GPUs; expected a GPU for each of the 8 workers",
        ),
        ({"batch_size": 1}, 2, NODES, "train.batch_size: got 1 for 2 workers"),
        ({}, 1, [], "0 nodes with 0 cores"),
    ],
)
def test_a_cluster_too_small_is_told(section: dict[str, Any], devices: int | None, nodes: Any, line: str) -> None:
    with pytest.raises(ParamsError, match=line):
        choose_shape(make_asked(**section), devices, nodes)


def test_a_gpu_is_taken_where_there_is_one() -> None:
    assert choose_accelerator(Compute(), 2) == "gpu"
    assert choose_accelerator(Compute(accelerator="gpu"), 1) == "gpu"
    assert choose_accelerator(Compute(accelerator="cpu"), 2) == "cpu"
    assert choose_accelerator(Compute(), 0) == "cpu"
    with pytest.raises(ParamsError, match=r"compute\.accelerator: got 'gpu'.*Look at `nvidia-smi`"):
        choose_accelerator(Compute(accelerator="gpu"), 0)


def test_rows_come_in_order_each_once_and_without_padding() -> None:
    rows_n = torch.tensor([5, -1, 2, 5, -1, 9])
    units_nu = torch.arange(6.0).reshape(6, 1)
    units, targets, rows = gather_rows(units_nu, torch.tensor([0, 1, 0, 0, 1, 1]), rows_n)
    assert rows.tolist() == [2, 5, 9]
    assert units.flatten().tolist() == [2.0, 0.0, 5.0]
    assert targets.tolist() == [0, 0, 1]


def test_targets_of_several_labels_keep_their_shape() -> None:
    units, targets, _ = gather_rows(torch.zeros(2, 3), torch.eye(3, dtype=torch.uint8)[:2], torch.tensor([1, 0]))
    assert (units.shape, targets.tolist()) == ((2, 3), [[0, 1, 0], [1, 0, 0]])


def test_padding_alone_leaves_nothing() -> None:
    units, _, rows = gather_rows(torch.zeros(2, 1), torch.zeros(2), torch.tensor([-1, -1]))
    assert (len(units), len(rows)) == (0, 0)
