"""Sends alerts to a webhook: JSON by POST, at least once each, in order. None stops the watching or holds it long.

An alert is to be sent as long as `unsent.json` lies beside its verdict: it is put there before the verdict, and removed
when the webhook has answered 2xx. So neither a webhook that is away nor a kill loses one.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.client import HTTPException
from threading import Thread
from typing import Any

from visionloop.errors import DatasetError, SourceError
from visionloop.monitoring.judge import Verdict
from visionloop.monitoring.watch import list_unsent, load_verdict, make_unsent_key
from visionloop.params.loop import Webhook
from visionloop.secrets import Environment, mask
from visionloop.workspace import Workspace

WAIT_S = 1.0  # before the second try; doubled before each further one
MAX_WAIT_S = 8.0
MAX_CHECKS = 20
PASSING = frozenset({408, 425, 429})  # 4xx that may pass
KEPT_FOR = timedelta(days=7)  # from the verdict on: an alert that is older helps nobody


@dataclass(frozen=True)
class Failure:
    """Why an alert or event was not sent. `is_refusal`: the webhook does not want this one; it may want another."""

    problem: str
    is_refusal: bool = False


def send_unsent(
    workspace: Workspace,
    variables: Mapping[str, str],
    *,
    now: datetime,
) -> list[str]:
    """Send the alerts that are still to be sent, the oldest window first; return what is to be told.

    The first that finds nobody ends it: those after it wait too, so that all come in order. One that is refused waits
    alone. Raises StoreError.
    """
    webhook, told = workspace.params.monitor.webhook, list[str]()
    waiting = list_unsent(workspace) if webhook else []
    for number, window in enumerate(waiting):
        try:
            verdict = load_verdict(workspace, window)
        except DatasetError as exc:
            told.append(f"the alert of window {window} cannot be sent: {exc}")
            continue
        if verdict is None:  # it is being judged, or that was cut short
            continue
        assert webhook
        is_old = now - datetime.fromisoformat(verdict.judged_at) > KEPT_FOR
        failure = None if is_old or not verdict.is_alert else post_alert(webhook, make_alert(verdict), variables)
        if failure is None:
            workspace.store.delete(make_unsent_key(workspace, window))
            told += [f"the alert of window {window} was not sent for {KEPT_FOR.days} days: given up"] if is_old else []
            continue
        others = len(waiting) - number - 1
        again = f"the next `visionloop monitor` sends that of window {window} again"
        told.append(f"the alert was not sent: {failure.problem}; {again}")
        if not failure.is_refusal:
            return [*told, f"{others} later alerts wait too"] if others else told
    return told


def make_alert(verdict: Verdict) -> dict[str, Any]:
    """Return what is sent: the verdict and the checks that alert, in words and numbers."""
    alerts = verdict.list_alerts()
    told = "; ".join(f"{check['name']}: {check['found']}" for check in alerts if check["kind"] == verdict.verdict)
    return {
        "event": f"visionloop.monitor.{verdict.verdict}",
        "name": verdict.name,
        "text": f"{verdict.name}: {verdict.verdict} from {verdict.start} to {verdict.end}: {told}"[:1000],
        "window": {"name": verdict.window, "start": verdict.start, "end": verdict.end, "images": verdict.num_images},
        "bundle": verdict.bundle,
        "p": verdict.p,
        "level": verdict.level,
        "checks": alerts[:MAX_CHECKS],
        "report": f"monitoring/{verdict.name}/{verdict.window}/report.html",
    }


def post_alert(
    webhook: Webhook,
    alert: Mapping[str, Any],
    variables: Mapping[str, str],
    *,
    where: str = "params.yaml monitor.webhook",
    sleep: Callable[[float], object] = time.sleep,
) -> Failure | None:
    """Send an alert, again after a while if the server is busy or away. Return what went wrong at last; None: sent.

    What is told holds neither the address's query nor a secret. `where` names the webhook in it.
    """
    environment = Environment(variables, where)
    try:
        url = environment.expand_url(webhook.url)
        headers = {name: environment.expand(value) for name, value in webhook.headers.items()}
    except SourceError as exc:
        return Failure(str(exc))
    if not url.startswith(("https://", "http://")):
        return Failure(mask(f"the webhook is {url[:60]!r}; expected http:// or https://", tuple(environment.secrets)))
    body = json.dumps(alert, ensure_ascii=False).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "visionloop", **headers}
    found: list[Failure | None] = []
    # A server that sends a byte now and then outlasts every timeout of a socket: nobody waits for it any longer.
    thread = Thread(target=lambda: found.append(_try(webhook, url, headers, body, sleep)), daemon=True)
    thread.start()
    thread.join(webhook.tries * 2 * webhook.timeout_s + (webhook.tries - 1) * MAX_WAIT_S)
    return found[0] if found else Failure("the webhook does not come to an end")


def _try(
    webhook: Webhook, url: str, headers: Mapping[str, str], body: bytes, sleep: Callable[[float], object]
) -> Failure | None:
    problem, is_final = "", False
    for number in range(webhook.tries):
        if number:
            sleep(min(WAIT_S * 2 ** (number - 1), MAX_WAIT_S))
        problem, is_final = _post(url, headers, body, webhook.timeout_s)
        if is_final:
            break
    return Failure(problem, is_refusal=is_final) if problem else None


def _make_opener() -> urllib.request.OpenerDirector:
    """Return an opener without redirects: a secret header must not follow one to another host."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _describe(exc: Exception) -> str:
    """Return why a connection failed, in the words of the system. Nothing of the address is in them."""
    reason = getattr(exc, "reason", exc)
    return (
        "timed out" if isinstance(reason, TimeoutError) else getattr(reason, "strerror", None) or type(reason).__name__
    )


def _post(url: str, headers: Mapping[str, str], body: bytes, timeout_s: float) -> tuple[str, bool]:
    """Return what went wrong ("": nothing), and whether another try is of no use."""
    try:
        request = urllib.request.Request(url, data=body, headers=dict(headers), method="POST")
        _make_opener().open(request, timeout=timeout_s).close()
        return "", True
    except urllib.error.HTTPError as exc:
        exc.close()
        return f"the webhook answers {exc.code}", exc.code < 500 and exc.code not in PASSING
    except (OSError, HTTPException) as exc:
        return f"the webhook does not answer ({_describe(exc)})", False
    except ValueError:
        return "the address or a header of the webhook is not valid", True
