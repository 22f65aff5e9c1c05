"""The section `monitor` of params.yaml."""

import pytest

from visionloop.errors import ParamsError
from visionloop.params import make_params


def test_level_follows_from_the_days_between_two_false_alarms() -> None:
    assert make_params({"name": "pets"}).monitor.level == pytest.approx(0.01)
    hourly = make_params({"name": "pets", "monitor": {"window_hours": 1, "false_alarm_days": 10}})
    assert hourly.monitor.level == pytest.approx(1 / 240)
    often = make_params({"name": "pets", "monitor": {"window_hours": 48, "false_alarm_days": 1}})
    assert often.monitor.level == 0.25


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"window_hours": 1, "false_alarm_days": 100},
            r"params.yaml monitor: .*at most 83.3333 for windows of 1 hours",
        ),
        ({"window_hours": 0}, r"params.yaml monitor.window_hours: got 0; expected greater than or equal to 1"),
        ({"max_client_share": 1.5}, r"params.yaml monitor.max_client_share: got 1.5"),
        ({"window": 24}, r"params.yaml monitor.window: unknown key; expected .*window_hours"),
        ({"webhook": {"headers": {}}}, r"params.yaml monitor.webhook.url: missing"),
        ({"webhook": {"url": "https://x.example", "tries": 99}}, r"params.yaml monitor.webhook.tries: got 99"),
    ],
)
def test_bad_value_is_named(section: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        make_params({"name": "pets", "monitor": section})
