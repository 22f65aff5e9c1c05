"""One map in threads: order, bounds, errors, and no thread left behind. Processes and Ray: see tests/integration."""

import sys
import threading
from collections.abc import Iterator

import pytest

from visionloop.errors import DatasetError, ParamsError
from visionloop.parallel import Engine, map_chunks, map_parallel


def find_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("map")]


def double(number: int) -> int:
    if number == 13:
        raise DatasetError("chunk 13", "is unlucky")
    return 2 * number


def test_results_come_in_order_and_few_are_held() -> None:
    taken: list[int] = []

    def count() -> Iterator[int]:
        for i in range(1000):
            taken.append(i)
            yield i

    results = map_parallel(lambda i: i * i, count(), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(taken) <= 3 + 2 * 4
    results.close()
    assert find_threads() == []


def test_an_error_ends_a_map_and_its_threads() -> None:
    with pytest.raises(DatasetError, match="chunk 13: is unlucky"):
        list(map_parallel(double, range(100)))
    assert find_threads() == []


def test_ray_is_asked_for_and_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ParamsError, match=r"compute\.engine: got 'ray', which is not installed; .* `pip install 'vision"
    ):
        list(map_chunks(double, [1], Engine("ray"), max_held=1))
