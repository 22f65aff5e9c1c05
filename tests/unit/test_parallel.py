"""One map in threads: order, bounds, errors, and no thread left behind. Processes and Ray: see tests/integration."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from visionloop import parallel
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
        ParamsError, match=r"compute\.engine: got 'ray', which is not installed; .* `(uv )?pip install "
    ):
        list(map_chunks(double, [1], Engine("ray"), max_held=1))


@pytest.mark.parametrize(
    ("own", "files", "quotas"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/\n", {"cpu.max": "nonsense"}, []),
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000", "cpu.max": "800000 100000"},
            [3.0, 8.0],
        ),
        (
            "4:cpu,cpuacct:/x\n1:memory:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "250000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            [2.5],
        ),
        ("4:cpu,cpuacct:/x\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, []),
        ("0::/../..\n", {"cpu.max": "100000 100000"}, [1.0]),
        ("", {}, []),
        ("torn", {}, []),
    ],
)
def test_the_limits_of_a_container_are_read(
    own: str, files: dict[str, str], quotas: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert list(parallel._read_quotas(tmp_path / "own", tmp_path / "root")) == quotas
    assert list(parallel._read_quotas(tmp_path / "none", tmp_path / "root")) == []


def test_a_container_may_have_fewer_cores_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda pid: set(range(8)))
    for quotas, cores in (([], 8), ([2.9], 2), ([0.5], 1), ([16.0, 3.0], 3)):
        monkeypatch.setattr(parallel, "_read_quotas", lambda own, root, quotas=quotas: iter(quotas))
        assert parallel.count_cores() == cores
