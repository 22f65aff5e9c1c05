"""Which precision a training computes in: as params say, or what is faster, on processors that are pretended."""

from dataclasses import replace
from typing import Any

import pytest

from processors import Stopwatch
from trainings import Ear, Place, make_place
from visionloop.networks import processor
from visionloop.networks.processor import load_measured
from visionloop.params import Train, make_params
from visionloop.training import precision as precisions
from visionloop.training.job import World
from visionloop.training.precision import look_at_hardware, resolve_precision

KEPT = "(measured once, kept in .visionloop/machine.json)"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("precision") / "ws", compute={"accelerator": "cpu"})
    return place.with_train(precision="auto")


@pytest.fixture(autouse=True)
def nothing_is_known(place: Place) -> None:
    (place.settings.hidden_dir / "machine.json").unlink(missing_ok=True)


def set_speeds(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> Stopwatch:
    watch = Stopwatch(fp32=fp32, bf16=bf16)
    monkeypatch.setattr(processor, "time_in_turn", watch)
    return watch


def resolve(place: Place) -> tuple[str, list[str]]:
    """Return the precision of a training, and what was told."""
    ear = Ear()
    return place.make_job(ear).hardware.precision, ear.lines


def test_auto_measures_once_where_there_is_bf16(
    each_processor: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = set_speeds(monkeypatch, 17.2, 33.1)
    if each_processor == "fp32":
        assert resolve(place) == ("fp32", [])
        assert watch.calls == 0
        return
    told = [f"computes in bf16: 33 images/s against 17 in fp32 {KEPT}"]
    assert resolve(place) == resolve(place) == ("bf16", told)
    assert watch.calls == 1
    (kept,) = load_measured(place.settings.hidden_dir)
    assert kept.images_per_s == {"fp32": 17.2, "bf16": 33.1}
    expected = {"step": "train", "accelerator": "cpu", "processor": "Pretended bf16", "backbone": "small_cnn"}
    assert kept.facts.items() >= {**expected, "units": 1}.items()
    assert kept.facts["image_size"] == [32, 32]


def test_flags_do_not_decide(bf16_processor: None, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    set_speeds(monkeypatch, 24.0, 16.0)
    assert resolve(place) == ("fp32", [f"computes in fp32: 24 images/s against 16 in bf16 {KEPT}"])


def test_another_network_or_size_of_thread_pool_is_measured_anew(
    bf16_processor: None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = set_speeds(monkeypatch, 1.0, 2.0)
    resolve(place)
    resolve(place.with_train(backbone="depthwise_cnn"))
    monkeypatch.setattr(precisions.torch, "get_num_threads", lambda: 7)
    resolve(place)
    assert watch.calls == 3
    resolve(place.with_train(learning_rate=1e-5, max_epochs=1))
    assert watch.calls == 3
    found = [(one.facts["backbone"], one.facts["threads"]) for one in load_measured(place.settings.hidden_dir)]
    assert found == [("small_cnn", 1), ("depthwise_cnn", 1), ("small_cnn", 7)]


def test_a_measurement_leaves_the_seed_alone(
    bf16_processor: None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_speeds(monkeypatch, 1.0, 2.0)
    torch = precisions.torch
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    resolve(place)
    assert torch.equal(torch.rand(4), expected)


def test_the_first_rank_measures_for_all(bf16_processor: None, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def share(world: World, make: Any) -> Any:
        if world.is_first:
            sent.append(make())
        return sent[-1]

    monkeypatch.setattr(precisions, "share", share)
    watch = set_speeds(monkeypatch, 1.0, 2.0)
    prepared = place.make_job().prepared
    first, told = precisions.choose_hardware(place, prepared, World(0, 2))
    elsewhere = replace(place, settings=replace(place.settings, home=place.settings.home / "elsewhere"))
    second, _ = precisions.choose_hardware(elsewhere, prepared, World(1, 2))
    assert first == second
    assert (first.precision, first.world_size, watch.calls) == ("bf16", 2, 1)
    assert told[0] == "2 processes train together, each on 4 images of a batch"
    assert told[1].startswith("computes in bf16: ")


@pytest.mark.parametrize("way", ["frozen", "knn"])
def test_what_trains_on_embeddings_measures_nothing(bf16_processor: None, way: Any) -> None:
    found = resolve_precision(Train(way=way), "cpu")
    assert found
    assert (found.name, found.is_news) == ("fp32", False)


def test_what_params_say_is_done(each_processor: str) -> None:
    for wanted in ("fp32", "bf16"):
        found = resolve_precision(Train(precision=wanted), "cpu")
        assert found
        assert found.name == wanted
        slow = wanted == "bf16" and each_processor == "fp32"
        assert found.is_news is slow
        assert ("slowly: there are no instructions for it here; `auto` would be faster" in found.why) is slow


def test_a_look_at_the_hardware_measures_nothing(each_processor: str) -> None:
    hardware, words = look_at_hardware(make_params({"name": "a", "compute": {"accelerator": "cpu"}}))
    assert (hardware.accelerator, hardware.world_size) == ("cpu", 1)
    if each_processor == "bf16":
        assert words == "fp32 or bf16, whichever is measured to be faster (train.precision: auto)"
    else:
        assert (hardware.precision, hardware.lightning_precision) == ("fp32", "32-true")
        assert words == "fp32 (the CPU has neither amx_bf16 nor avx512_bf16)"
    assert (
        look_at_hardware(make_params({"name": "a", "train": {"precision": "bf16"}}))[0].lightning_precision
        == "bf16-mixed"
    )
