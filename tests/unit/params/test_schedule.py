"""Cron fields and time zones are checked when params.yaml is read, and the wrong field is named."""

import pytest

from visionloop.errors import ParamsError
from visionloop.params import make_params


@pytest.mark.parametrize(
    "cron",
    ["0 3 * * *", "*/15 0-6,22 * * mon-fri", "5 4 1,15 JAN-mar 0", "0 0 29 2 *", "0 0 31 2 sun", "10-50/10 * * * 7"],
)
def test_a_cron_that_can_be_due_is_taken(cron: str) -> None:
    section = make_params({"name": "a", "schedule": {"retrain": cron, "timezone": "Europe/Berlin"}}).schedule
    assert (section.retrain, section.timezone) == (cron, "Europe/Berlin")


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("61 3 * * *", "a minute of 0 to 59 as field 1, not '61'"),
        ("0 24 * * *", "an hour"),
        ("0 3 0 * *", "a day of 1 to 31 as field 3, not '0'"),
        ("0 3 * 13 *", "a month of 1 to 12 as field 4, not '13'"),
        ("0 3 * * 8", "a weekday of 0 to 7 as field 5, not '8'"),
        ("0 3 * * monday", "a weekday of 0 to 7 as field 5, not 'monday'"),
        ("*/0 3 * * *", "a minute of 0 to 59 as field 1"),
        ("5-1 3 * * *", "a minute that goes upwards as field 1, not '5-1'"),
        ("0 3 30 2 *", "a day that there is: no month of '2' has a day '30'"),
        ("@daily", "a cron expression of five fields"),
        ("0 3 * * * *", "a cron expression of five fields"),
        ("0,,5 3 * * *", "a minute of 0 to 59 as field 1"),
    ],
)
def test_a_cron_that_is_wrong_names_its_field(cron: str, message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        make_params({"name": "a", "schedule": {"retrain": cron}})
    assert message.replace("an hour", "a hour") in str(caught.value)
    assert caught.value.where == "params.yaml schedule.retrain"


@pytest.mark.parametrize("name", ["Berlin", "", "../etc/passwd", "UTC+25"])
def test_a_time_zone_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ParamsError, match=r"schedule\.timezone: got .*; expected the name of a time zone"):
        make_params({"name": "a", "schedule": {"timezone": name}})
