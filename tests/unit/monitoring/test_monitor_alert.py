"""The alert by webhook: sent with its secret, tried again, never for long, and silent about secrets."""

import json
import time

import pytest

from http_server import Answer, Handler, WebServer, serve
from visionloop.monitoring.alert import make_alert, post_alert
from visionloop.monitoring.judge import Verdict
from visionloop.params.loop import Webhook

CHECK = {"name": "drift", "kind": "drift", "state": "alert", "found": "p 0.001", "expected": "", "value": 0.001}
VERDICT = Verdict(
    name="pets",
    window="20260302T0000",
    start="2026-03-02T00:00:00+00:00",
    end="2026-03-03T00:00:00+00:00",
    verdict="drift",
    bundle="ab" * 32,
    entry=3,
    num_images=200,
    num_looked_at=200,
    reference=(),
    p=0.001,
    level=0.01,
    expected_accuracy=0.9,
    expected_is_trusted=False,
    labelled_accuracy=None,
    num_labels=0,
    checks=(CHECK, {**CHECK, "name": "size", "kind": "broken", "state": "fine"}),
    judged_at="2026-03-03T01:00:00+00:00",
)
SECRETS = {"HOOK_TOKEN": "s3cret-token", "HOOK_PATH": "a b", "FILE": "file:///etc/passwd", "SCHEME": "ftp:"}


def send(site: WebServer, **section: object) -> tuple[str | None, list[float]]:
    waits: list[float] = []
    values = {"url": f"{site.url}/hook", "headers": {"Authorization": "Bearer ${HOOK_TOKEN}"}, "timeout_s": 2.0}
    failure = post_alert(Webhook(**{**values, **section}), make_alert(VERDICT), SECRETS, sleep=waits.append)
    return failure.problem if failure else None, waits


def test_alert_is_posted_as_json_with_its_secret_header() -> None:
    with serve({"/hook": Answer(status=204)}) as site:
        assert send(site) == (None, [])
    (request,) = site.requests
    assert (request.method, request.headers["authorization"]) == ("POST", "Bearer s3cret-token")
    sent = json.loads(request.body)
    assert sent == json.loads(json.dumps(make_alert(VERDICT)))
    assert sent["event"] == "visionloop.monitor.drift"
    assert [check["name"] for check in sent["checks"]] == ["drift"]
    assert sent["text"] == ("pets: drift from 2026-03-02T00:00:00+00:00 to 2026-03-03T00:00:00+00:00: drift: p 0.001")
    assert sent["report"] == "monitoring/pets/20260302T0000/report.html"


def test_busy_server_is_asked_again_and_a_refusal_is_final() -> None:
    answers = iter([Answer(status=503), Answer(status=429), Answer()])
    with serve({"/hook": lambda _: next(answers)}) as site:
        assert send(site) == (None, [1.0, 2.0])
        site.routes["/hook"] = Answer(status=403)
        assert send(site) == ("the webhook answers 403", [])
        site.routes["/hook"] = Answer(status=500)
        assert send(site, tries=2) == ("the webhook answers 500", [1.0])


def test_redirect_is_not_followed() -> None:
    with serve({"/other": Answer()}) as site:
        site.routes["/hook"] = Answer(status=302, headers={"Location": f"{site.url}/other"})
        problem, _ = send(site)
    assert problem == "the webhook answers 302"
    assert site.targets == ["/hook"]


def test_server_that_is_away_or_never_ends_holds_nobody_up() -> None:
    def drip(handler: Handler) -> None:
        for _ in range(100):
            handler.wfile.write(b"H")
            time.sleep(0.1)

    with serve({"/hook": drip}) as site:
        started = time.monotonic()
        problem, _ = send(site, tries=1, timeout_s=0.3)
        assert time.monotonic() - started < 11
    assert problem is not None and problem.startswith("the webhook does not")
    problem, waits = send(site)  # it is gone
    assert (problem, waits) == ("the webhook does not answer (Connection refused)", [1.0, 2.0])


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"headers": {"X-Token": "${NO_SUCH}"}}, "the variable NO_SUCH is not set"),
        ({"url": "${FILE}"}, "expected http:// or https://"),
        ({"headers": {"X-Token": "a\r\nX-Evil: 1"}}, "a header of the webhook is not valid"),
        ({"url": "http://[bad"}, "the address or a header of the webhook is not valid"),
        ({"url": "${SCHEME}/${HOOK_TOKEN}"}, "expected http:// or https://"),
    ],
)
def test_what_cannot_be_sent_is_told_without_secrets(section: dict[str, object], problem: str) -> None:
    with serve({}) as site:
        told, _ = send(site, **section)
    assert told is not None and problem in told
    assert "s3cret" not in told
    assert site.requests == []
