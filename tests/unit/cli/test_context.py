"""Progress on the terminal: the rate of this run alone, and no end where nobody knows it."""

import pytest

from visionloop.cli import context


def test_the_rate_leaves_out_what_an_earlier_run_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 110.0])
    monkeypatch.setattr(context.time, "perf_counter", lambda: next(clock))
    lines: list[str] = []
    show = context.make_log_progress("prepared", "images", lines.append)
    show(1000, 1500)
    show(1200, 1500)
    show(1500, 1500)
    assert lines == ["prepared 1,200 of 1,500 images (50/s, 6 s left)", "prepared 1,500 of 1,500 images (50/s)"]


def test_no_end_is_told_where_none_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(context.time, "perf_counter", lambda: next(clock))
    lines: list[str] = []
    show = context.make_log_progress("checked", "images", lines.append)
    show(0, 0)
    show(80, 0)
    assert lines == ["checked 80 images (20/s)"]
