"""Memory in the loop: pages of a step are kept for the next one, and what follows when there is too little of it."""

import resource
import sys
from pathlib import Path

import psutil
import pytest
import torch

from visionloop.errors import TrainingError
from visionloop.params import Train
from visionloop.training.loop import MemoryPlan, _find_glibc, is_out_of_memory, keep_memory, keep_plan, load_plan

NUM_FLOATS = 4 * 1024 * 1024
NUM_BYTES = 4 * NUM_FLOATS
PAGES = NUM_BYTES // resource.getpagesize()

only_glibc = pytest.mark.skipif(not sys.platform.startswith("linux") or _find_glibc() is None, reason="no glibc")


def count_faults() -> int:
    """How many pages the system had to give for filling and freeing 16 MiB three times, after some times uncounted."""
    for _ in range(30):
        torch.ones(NUM_FLOATS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(NUM_FLOATS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@only_glibc
def test_pages_are_kept_inside_and_given_back_at_the_end() -> None:
    with keep_memory():
        assert count_faults() < PAGES / 10, "outside it would be three times all pages"
        inside = psutil.Process().memory_info().rss
    assert inside - psutil.Process().memory_info().rss > 0.9 * NUM_BYTES


@only_glibc
def test_an_error_inside_gives_the_memory_back_too() -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(RuntimeError, match="inside"), keep_memory():
        for _ in range(4):
            torch.ones(NUM_FLOATS)
        assert psutil.Process().memory_info().rss - before > 0.9 * NUM_BYTES
        raise RuntimeError("inside")
    assert psutil.Process().memory_info().rss - before < 0.5 * NUM_BYTES


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: ..."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError("Unable to allocate 3 GiB for an array"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_torch_itself_says_it_in_these_words() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)


def test_halving_keeps_the_images_of_a_step(tmp_path: Path) -> None:
    plan = load_plan(tmp_path, Train(batch_size=12, accumulate=2))
    assert (plan.batch_in_memory, plan.accumulate, plan.is_reduced) == (12, 2, False)
    sizes = []
    while plan.batch_in_memory > 1:
        plan = plan.halve()
        sizes.append((plan.batch_in_memory, plan.accumulate, plan.is_reduced))
    assert sizes == [(6, 4, True), (3, 8, True), (1, 24, True)]
    with pytest.raises(TrainingError, match="not even one image at a time fits into memory"):
        plan.halve()


def test_the_reduced_size_is_remembered(tmp_path: Path) -> None:
    section = Train(batch_size=32)
    keep_plan(tmp_path, load_plan(tmp_path, section).halve())
    assert load_plan(tmp_path, section) == MemoryPlan(batch_in_memory=16, batch_size=32, step_size=32)
    assert load_plan(tmp_path, Train(batch_size=8)).batch_in_memory == 8, "never more than params.yaml asks for"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"batch_in_memory": "many"}', '{"batch_in_memory": null}'])
def test_a_damaged_note_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory.json").write_text(text)
    assert load_plan(tmp_path, Train(batch_size=32)).batch_in_memory == 32
