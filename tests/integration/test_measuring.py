"""`auto` measures for real, on a tiny network: what is kept and told, and that it happens once. No speed is judged.

What is timed is the real step and the real encoder; the processor is pretended to have bf16, which any CPU computes.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from processors import Stopwatch, pretending
from trainings import Ear, Place, make_place, replace_train
from visionloop.doctor import Finding, _check_measured
from visionloop.features import runtimes
from visionloop.features.embed import embed
from visionloop.features.view import load_facts
from visionloop.networks import processor
from visionloop.networks.processor import MIN_COSINE, load_measured, time_in_turn
from visionloop.params import make_params

KEPT = "(measured once, kept in .visionloop/machine.json)"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(
        tmp_path_factory.mktemp("measuring") / "ws", max_epochs=1, precision="auto", compute={"accelerator": "cpu"}
    )


@pytest.fixture
def place(made: Place) -> Place:
    (made.settings.hidden_dir / "machine.json").unlink(missing_ok=True)
    return made


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was really timed so far."""
    names: list[str] = []

    def listen(steps: Mapping[str, Callable[[], object]], num_images: int) -> dict[str, float]:
        names.extend(steps)
        return time_in_turn(steps, num_images)

    monkeypatch.setattr(processor, "time_in_turn", listen)
    monkeypatch.setattr(runtimes, "has_openvino", lambda: False)
    monkeypatch.setattr(runtimes, "HOPELESS", 1e9)  # on a busy machine any of them may seem so
    return names


def set_way(place: Place, runtime: str = "auto", **train: Any) -> Place:
    params = make_params({**place.params.model_dump(mode="json"), "embed": {"runtime": runtime}})
    return Place(place.settings, replace_train(params, way="frozen", **train), place.store)


def read_entries(place: Place) -> list[dict[str, Any]]:
    return json.loads((place.settings.hidden_dir / "machine.json").read_text())["measured"]  # type: ignore[no-any-return]


def test_a_training_measures_once_keeps_it_and_tells_it(
    bf16_processor: None, place: Place, measured: list[str]
) -> None:
    first, second = Ear(), Ear()
    place.train(first)
    assert measured == ["fp32", "bf16"]
    place.train(second)
    assert measured == ["fp32", "bf16"], "a second training measures nothing"
    (entry,) = read_entries(place)
    assert set(entry) == {"facts", "images_per_s", "cosine"}
    assert set(entry["facts"]) == {
        *("step", "accelerator", "processor", "threads", "torch"),
        *("backbone", "units", "image_size"),
    }
    assert all(speed > 0 for speed in entry["images_per_s"].values())
    (kept,) = load_measured(place.settings.hidden_dir)
    for ear in (first, second):
        (line,) = [line for line in ear.lines if line.startswith("computes in")]
        assert line == f"computes in {kept.describe()} {KEPT}"
    assert {run["tags"]["visionloop.precision"] for run in place.tracking.runs.values()} == {kept.choice}
    card = json.loads((place.settings.candidate_dir / "card.json").read_text())
    assert card["network"]["precision"] == kept.choice


def test_an_encoder_is_measured_once_and_all_that_runs_it_agrees(
    each_processor: str, place: Place, measured: list[str]
) -> None:
    place = set_way(place)
    candidates = ["onnxruntime fp32", "torch fp32", *["torch bf16"][: each_processor == "bf16"]]
    told: list[str] = []
    embed(place, tell=told.append)
    assert measured == candidates
    embed(place, tell=told.append)
    assert measured == candidates, "a second time measures nothing"
    (kept,) = load_measured(place.settings.hidden_dir)
    assert list(kept.images_per_s) == list(kept.cosine) == candidates
    assert min(kept.cosine.values()) >= MIN_COSINE
    assert [line for line in told if line.startswith("embeds by")] == [f"embeds by {kept.describe()} {KEPT}"] * 2
    facts = load_facts(place.settings.features_dir)
    assert f"{facts.runtime} {facts.precision}" == kept.choice
    assert facts.weights_digest == kept.facts["weights"]
    finding = _check_measured(place.settings)
    assert finding == Finding("measured", True, f"embed small_cnn at 32 x 32: {kept.describe()}")


def test_the_faster_encoder_is_taken_and_its_vectors_stand_alone(
    bf16_processor: None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another one is faster, a table of its own is computed, and the training is another."""
    monkeypatch.setattr(runtimes, "has_openvino", lambda: False)
    place, chosen, keys = set_way(place, seed=5), [], []
    for name in ("onnxruntime fp32", "torch bf16"):
        speeds = {"onnxruntime_fp32": 10.0, "torch_fp32": 5.0, "torch_bf16": 5.0, name.replace(" ", "_"): 20.0}
        monkeypatch.setattr(processor, "time_in_turn", Stopwatch(**speeds))
        (place.settings.hidden_dir / "machine.json").unlink(missing_ok=True)
        assert embed(place).num_computed == 72, "nothing is taken from the other's table"
        facts = load_facts(place.settings.features_dir)
        chosen.append((f"{facts.runtime} {facts.precision}", facts.digest))
        keys.append(place.make_job().key)
        place.train()
        card = json.loads((place.settings.candidate_dir / "card.json").read_text())
        assert card["network"]["embeddings"] == name
        assert card["network"]["precision"] == "fp32"
    assert [name for name, _ in chosen] == ["onnxruntime fp32", "torch bf16"]
    assert len({digest for _, digest in chosen}) == len(set(keys)) == 2


def test_what_is_far_slower_is_run_twice_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[float] = []

    def make(seconds: float) -> Callable[[], runtimes.Run]:
        def run(images_nhwc: Any) -> Any:
            runs.append(seconds)
            time.sleep(seconds)
            return np.ones((len(images_nhwc), 3), np.float32)

        return lambda: run

    monkeypatch.setattr(processor, "time_in_turn", Stopwatch(quick=400.0, slow=1.0))
    speeds, cosine = runtimes.time_encoders({"quick": make(0.0), "slow": make(0.2)}, np.zeros((4, 8, 8, 3), np.uint8))
    assert speeds["quick"] == 400.0
    assert 5 < speeds["slow"] <= 20, "four images in 0.2 s or a little more: its own figure, not the stopwatch's"
    assert cosine == {"quick": 1.0, "slow": 1.0}
    assert [name for name in runs if name] == [0.2, 0.2]


def test_vectors_that_differ_are_not_taken_however_fast_they_come(
    bf16_processor: None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visionloop.networks.export import TorchEncoder

    monkeypatch.setattr(runtimes, "has_openvino", lambda: False)
    monkeypatch.setattr(TorchEncoder, "embed", lambda self, images: np.ones((len(images), 64), np.float32))
    monkeypatch.setattr(processor, "time_in_turn", Stopwatch(onnxruntime_fp32=10.0, torch_fp32=99.0, torch_bf16=99.0))
    told: list[str] = []
    embed(set_way(place, seed=6), tell=told.append)
    assert told[1] == (
        "embeds by onnxruntime fp32: 10 images/s against 99 in torch fp32 (its vectors differ), "
        f"99 in torch bf16 (its vectors differ) {KEPT}"
    )


def test_a_runtime_that_cannot_run_is_passed_over(
    bf16_processor: None, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visionloop.networks.export import TorchEncoder

    def fail(self: object, images: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(runtimes, "has_openvino", lambda: False)
    monkeypatch.setattr(TorchEncoder, "embed", fail)
    monkeypatch.setattr(processor, "time_in_turn", Stopwatch(onnxruntime_fp32=10.0))
    told: list[str] = []
    embed(set_way(place, seed=7), tell=told.append)
    assert told[1].startswith("embeds by onnxruntime fp32: 10 images/s against none in torch fp32, none in torch bf16 ")


def test_doctor_says_that_nothing_was_measured(place: Place, tmp_path: Path) -> None:
    with pretending("bf16", tmp_path):
        assert _check_measured(place.settings).found == "nothing yet: `auto` measures when it first trains or embeds"
