"""The section `monitor` of params.yaml."""

from pathlib import Path

import pytest
import yaml

from visionloop.errors import ParamsError
from visionloop.params import make_params


def test_level_follows_from_the_days_between_two_false_alarms() -> None:
    assert make_params({"name": "pets"}).monitor.level == pytest.approx(0.01)
    hourly = make_params({"name": "pets", "monitor": {"window_hours": 1, "false_alarm_days": 10}})
    assert hourly.monitor.level == pytest.approx(1 / 240)
    shortest = make_params({"name": "pets", "monitor": {"window_hours": 1}}).monitor
    assert (shortest.false_alarm_days, shortest.level) == (83, pytest.approx(1 / 24 / 83))
    assert make_params({"name": "pets", "monitor": {"window_hours": 3}}).monitor.false_alarm_days == 100
    often = make_params({"name": "pets", "monitor": {"window_hours": 48, "false_alarm_days": 1}})
    assert often.monitor.level == 0.25


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"window_hours": 1, "false_alarm_days": 100},
            r"params.yaml monitor: .*`false_alarm_days` of at most 83.3333 for windows of 1 hour \(`window_hours`\)",
        ),
        ({"window_hours": 0}, r"params.yaml monitor.window_hours: got 0; expected greater than or equal to 1"),
        ({"max_client_share": 1.5}, r"params.yaml monitor.max_client_share: got 1.5"),
        ({"window": 24}, r"params.yaml monitor.window: unknown key; expected .*window_hours"),
        ({"webhook": {"headers": {}}}, r"params.yaml monitor.webhook.url: missing"),
        ({"webhook": {"url": "ftp://x"}}, r"webhook.url: got 'ftp://x'; expected an address .* https:// or http://"),
        ({"webhook": {"url": "ftp://example.com/x"}}, r"expected an address that begins with https:// or http://"),
        ({"webhook": {"url": "ftp://u:w0rd@x"}}, r"webhook.url: got 'ftp://\*\*\*@x'; expected an address"),
        ({"webhook": {"url": "x"}}, r"expected an address that begins with https:// or http://"),
        ({"webhook": {"url": "https://x.example", "tries": 99}}, r"params.yaml monitor.webhook.tries: got 99"),
    ],
)
def test_bad_value_is_named(section: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        make_params({"name": "pets", "monitor": section})


def test_example_of_the_first_day_is_taken() -> None:
    text = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text()
    example = text.partition("## Try it on the first day")[2].partition("```yaml\n")[2].partition("```")[0]
    monitor = make_params({"name": "pets", **yaml.safe_load(example)}).monitor
    assert (monitor.window_hours, monitor.block_hours, monitor.max_client_share) == (1, 0, 1.0)


def test_address_of_a_webhook_may_come_from_the_environment() -> None:
    webhook = make_params({"name": "pets", "monitor": {"webhook": {"url": "${HOOK}"}}}).monitor.webhook
    assert webhook is not None and webhook.url == "${HOOK}"
