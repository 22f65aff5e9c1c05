"""The engine that answers: the fastest one that is approved, found out in a process of its own, and kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from fakes import make_bundle
from visionloop import engines
from visionloop.bundle import INT8_MODEL, Bundle, load_bundle, seal_bundle
from visionloop.engines import list_candidates, open_fastest, open_plainly
from visionloop.errors import BundleError
from visionloop.networks.processor import load_measured
from visionloop.predictor import FP32, INT8

BOTH = [FP32, INT8]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(engines, "has_openvino", lambda: False)
    monkeypatch.setattr(engines, "read_cpu_name", lambda: "a processor")
    make_bundle(tmp_path / "b", engines=BOTH)
    return load_bundle(tmp_path / "b")


def answer(monkeypatch: pytest.MonkeyPatch, **speeds: Any) -> list[list[str]]:
    """Let the process that measures say so; return the list of what it is asked about."""
    asked: list[list[str]] = []
    said = {"serve": {FP32: 100.0, INT8: 300.0}, "decode beside": {"1 decoding": 50.0, "2 decoding": 80.0}} | speeds

    def ask(folder: Path, candidates: list[str], threads: int) -> dict[str, dict[str, float]]:
        asked.append([*candidates, str(threads)])
        return said

    monkeypatch.setattr(engines, "_ask", ask)
    return asked


def test_the_fastest_is_taken_and_kept_for_this_machine(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch)
    opened = open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=2)
    assert (opened.predictor.engine, opened.decoders) == (INT8, 2)
    assert opened.why == "onnxruntime int8: 300 images/s against 100 in onnxruntime fp32 (2 threads, 2 decoding)"
    assert open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=2).why == opened.why
    assert asked == [[FP32, INT8, "2"]], "it is asked once"
    assert [one.facts["step"] for one in load_measured(tmp_path)] == ["serve", "decode beside"]
    assert (
        load_measured(tmp_path)[0].describe_all().startswith("serve linear at 32 x 32: onnxruntime int8: 300 images/s")
    )
    open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=3)
    assert asked[1:] == [[FP32, INT8, "3"]], "with other threads it is another question"


def test_a_retrained_network_of_the_same_kind_is_not_measured_again(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch)
    open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=2)
    make_bundle(tmp_path / "next", seed=7, engines=BOTH)
    opened = open_fastest(load_bundle(tmp_path / "next"), BOTH, hidden_dir=tmp_path, threads=2)
    assert (opened.predictor.engine, len(asked)) == (INT8, 1)


@pytest.mark.parametrize("speeds", [{FP32: 100.0, INT8: 105.0}, {FP32: 100.0, INT8: 0.0}], ids=["hardly", "cannot run"])
def test_fp32_answers_where_the_other_is_hardly_faster(
    speeds: dict[str, float], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, serve=speeds)
    assert open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=2).predictor.engine == FP32


@pytest.mark.parametrize(
    ("card", "allowed"), [([FP32], BOTH), (BOTH, [FP32]), (BOTH, []), ([FP32, "openvino int8"], [INT8])]
)
def test_what_one_of_both_does_not_approve_is_never_opened(
    card: list[str], allowed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "has_openvino", lambda: False)
    asked = answer(monkeypatch)
    make_bundle(tmp_path / "b", engines=card)
    opened = open_fastest(load_bundle(tmp_path / "b"), allowed, hidden_dir=tmp_path, threads=2)
    assert (opened.predictor.engine, opened.why) == (FP32, "onnxruntime fp32: no other engine is approved")
    assert not opened.had_choice, "nothing that anybody wants to know"
    assert asked == []
    assert not (tmp_path / "machine.json").exists()


def test_candidates_are_what_this_machine_has(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [FP32, INT8, "openvino fp32", "openvino bf16", "openvino int8"]
    object.__setattr__(bundle.card, "runtimes", tuple(everything))
    assert list_candidates(bundle, everything) == BOTH
    monkeypatch.setattr(engines, "has_openvino", lambda: True)
    for bf16 in (False, True):
        monkeypatch.setattr(engines, "has_bf16", lambda bf16=bf16: bf16)
        expected = [name for name in everything if bf16 or not name.endswith("bf16")]
        assert list_candidates(bundle, everything) == expected
    (bundle.folder / INT8_MODEL).unlink()
    assert list_candidates(bundle, everything) == [FP32, "openvino fp32", "openvino bf16"]


def test_int8_is_served_only_on_the_kind_of_processor_that_approved_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made, here, candidates in (
        (True, True, BOTH),
        (True, False, [FP32]),
        (False, True, [FP32]),
        (False, False, BOTH),
    ):
        object.__setattr__(bundle.card, "engines", {INT8: {"approved": True, "exact": made}})
        monkeypatch.setattr(engines, "sums_int8_exactly", lambda here=here: here)
        assert list_candidates(bundle, BOTH) == candidates
    monkeypatch.setattr(engines, "sums_int8_exactly", lambda: True)
    assert open_fastest(bundle, BOTH, hidden_dir=tmp_path).why == f"{FP32}: {INT8} cannot be used here"


def test_a_card_of_before_says_only_the_runtime(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    bundle = load_bundle(tmp_path / "b")
    assert bundle.card.runtimes == ("onnxruntime",)
    opened = open_fastest(bundle, bundle.card.runtimes, hidden_dir=tmp_path)
    assert (opened.predictor.engine, opened.why) == (FP32, f"{FP32}: no other engine is approved")


def put_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let a shell script be the process that measures."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(engines.sys, "executable", str(program))


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("kill -SEGV $$", "it ended with signal 11"),
        ("exit 3", "it ended with code 3"),
        ("exec sleep 30", "it hung for 0.3 s"),
        ("echo nonsense", "it said nothing that can be read"),
        ("echo '{}'", "it said nothing that can be read"),
        ("""echo '{"serve": {}, "decode beside": {}}'""", "it measured something else"),
        ("""echo '{"serve": {"my own": 1}, "decode beside": {}}'""", "it measured something else"),
    ],
)
def test_where_measuring_fails_fp32_answers_and_it_is_told(
    script: str, why: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "LIMIT_S", 0.3 if "sleep" in script else 30)
    put_instead(tmp_path, monkeypatch, script)
    said: list[str] = []
    opened = open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=2, tell=said.append)
    assert opened.predictor.engine == FP32
    assert said == [f"answers by {FP32}: which engine is fastest could not be measured: {why}"]
    assert opened.why == f"{FP32}: which engine is fastest could not be measured: {why}"
    assert not (tmp_path / "machine.json").exists(), "the next start tries it again"


def test_what_was_measured_in_haste_is_good_for_now_and_not_kept(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, serve={FP32: 100.0})
    assert open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=2).predictor.engine == FP32
    assert not (tmp_path / "machine.json").exists()


def test_an_engine_with_other_golden_answers_is_not_used(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement holds for the network, the answers are checked for each bundle."""
    answer(monkeypatch)
    make_bundle(tmp_path / "other", seed=9)
    (bundle.folder / INT8_MODEL).write_bytes((tmp_path / "other" / "model.onnx").read_bytes())
    said: list[str] = []
    opened = open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=2, tell=said.append)
    assert opened.predictor.engine == FP32
    assert said[0].startswith(f"answers by {FP32}: {INT8} is not used here: golden answers differ by ")


def test_a_second_graph_that_is_no_graph_is_not_used(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch)
    (bundle.folder / INT8_MODEL).write_bytes(b"\xff" * 100)
    said: list[str] = []
    assert open_fastest(bundle, BOTH, hidden_dir=tmp_path, threads=2, tell=said.append).predictor.engine == FP32
    assert said == [f"answers by {FP32}: {INT8} is not used here: is not ONNX"]


def test_a_bundle_that_is_wrong_in_fp32_too_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", engines=BOTH)
    path = tmp_path / "b" / "golden" / "answers.json"
    answers = json.loads(path.read_text())
    path.write_text(json.dumps({**answers, "logits": [[9.0, 0.0, 0.0]] * 4}))
    seal_bundle(tmp_path / "b")
    bundle = load_bundle(tmp_path / "b")
    for open_model in (open_plainly, lambda b, a: open_fastest(b, a, hidden_dir=tmp_path)):
        with pytest.raises(BundleError, match="golden answers differ"):
            open_model(bundle, ())


def test_the_real_process_times_all_and_keeps_no_engine_with_other_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ENGINE_S": 0.02, "SPLIT_S": 0.02}.items():
        monkeypatch.setattr(engines, name, value)
    make_bundle(tmp_path / "b", engines=BOTH)
    far = 1e9
    found = engines.time_engines(tmp_path / "b", BOTH, 2, far)
    assert list(found["serve"]) == BOTH and min(found["serve"].values()) > 0
    assert list(found["decode beside"]) == ["1 decoding", "2 decoding"] and min(found["decode beside"].values()) > 0
    assert list(engines.time_engines(tmp_path / "b", BOTH, 1, far)["decode beside"]) == ["1 decoding"]
    assert list(engines.time_engines(tmp_path / "b", BOTH, 1, 0.0)["serve"]) == [FP32], "no time is left"
    make_bundle(tmp_path / "other", seed=9)
    (tmp_path / "b" / INT8_MODEL).write_bytes((tmp_path / "other" / "model.onnx").read_bytes())
    seal_bundle(tmp_path / "b")
    assert engines.time_engines(tmp_path / "b", BOTH, 1, far)["serve"][INT8] == 0


def test_the_process_itself(bundle: Bundle, tmp_path: Path) -> None:
    found = engines._ask(bundle.folder, BOTH, 1)
    assert list(found["serve"]) == BOTH
    assert min(found["serve"].values()) > 0
