"""Is the data sound, and the service well? What is broken upstream is no drift, and no reason to retrain. Pure.

Each check compares a window with the reference, and says what it found and what it expected. What was so in the
reference already (one client, one picture, a size) is no fault.

Dimensions: n images, g of them in the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionloop.data.prediction_log import RequestCounts
from visionloop.monitoring.window import Traffic
from visionloop.params.loop import Monitor

Kind = Literal["broken", "drift", "quality", "service"]
State = Literal["fine", "alert", "unknown"]
FloatArray = NDArray[np.float64]

BLANK_CONTRAST = 0.01  # standard deviation of the grey values, which are from 0 to 1
USUAL_SHARE = 0.01  # of the reference: a size that is usual there
MOSTLY = 0.9
MIN_PICTURES = 10
MIN_REQUESTS = 5  # that were refused or failed: fewer are chance
GREY_SPREAD = 2.0  # of 255, between the channels of a grey picture
MIN_COLOUR_GAP = 6.0  # of 255, between the mean red and blue of a reference that has a tint at all


@dataclass(frozen=True)
class Check:
    """The result of one check of a window. `value` is held against `line` where both are there."""

    name: str
    kind: Kind
    state: State
    found: str
    expected: str = ""
    value: float | None = None
    line: float | None = None


def check_traffic(
    window: Traffic, reference: Traffic | None, volumes: Sequence[int], section: Monitor, *, has_begun: bool = True
) -> list[Check]:
    """Return the checks for broken data and for the service that the log alone allows.

    `volumes` are the images of the windows before. An empty window has one result only: it is a fault only if images
    came before it (`has_begun`).
    """
    if not len(window) and not has_begun:
        found = "nothing was served yet: the log has no image of this window or of a time before it"
        return [Check("empty", "broken", "unknown", found, "images, once the server answers", 0.0)]
    if not len(window):
        return [Check("empty", "broken", "alert", "no image in the window", "images", 0.0)]
    return [
        _check_share("one_client", "client", window.client_n, _get(reference, "client_n"), section.max_client_share),
        _check_share("same_picture", "picture", window.picture_n, _get(reference, "picture_n"), section.max_same_share),
        _check_blank(window, reference, section.max_same_share),
        _check_size(window, reference),
        _check_volume(len(window), volumes, section.max_volume_ratio),
        *_check_latency(window, section.max_latency_ms),
    ]


def _get(reference: Traffic | None, name: str) -> NDArray[np.str_]:
    """Return a column of the reference; empty without one."""
    return np.zeros(0, np.str_) if reference is None else getattr(reference, name)


def _check_share(name: str, what: str, value_n: NDArray[np.str_], before_g: NDArray[np.str_], most: float) -> Check:
    """Alert if one value has more than its share of the images, and had not in the reference."""
    values, counts = np.unique(value_n[value_n != ""], return_counts=True)
    if not len(values):
        return Check(name, "broken", "unknown", f"no {what} is in the log")
    top, share = str(values[counts.argmax()]), float(counts.max()) / len(value_n)
    shown = f" ({top[:40]})" if what == "client" else ""
    found = f"one {what}{shown} has {100 * share:.0f} % of {len(value_n):,} images"
    usual = float((before_g == top).mean()) if len(before_g) else 0.0
    if share > most and usual > most:
        return Check(name, "broken", "fine", f"{found}, and {100 * usual:.0f} % of the reference", "", share, most)
    state: State = "alert" if share > most and len(value_n) >= MIN_PICTURES else "fine"
    return Check(name, "broken", state, found, f"at most {100 * most:.0f} %", share, most)


def _check_blank(window: Traffic, reference: Traffic | None, most: float) -> Check:
    share, usual = (_share_blank(one) for one in (window, reference))
    if share is None:
        return Check("blank", "broken", "unknown", "no contrast is in the log")
    state: State = "alert" if share > most and (usual or 0.0) <= most else "fine"
    return Check(
        "blank",
        "broken",
        state,
        f"{100 * share:.0f} % of the images are of one colour",
        f"at most {100 * most:.0f} %",
        share,
        most,
    )


def _share_blank(traffic: Traffic | None) -> float | None:
    if traffic is None or not np.isfinite(traffic.contrast_n).any():
        return None
    return float((traffic.contrast_n < BLANK_CONTRAST).mean())


def _check_size(window: Traffic, reference: Traffic | None) -> Check:
    """Alert if images had few sizes, and most of them have others now."""
    if reference is None or not len(reference):
        return Check("size", "broken", "unknown", "no reference yet")
    sizes, counts = np.unique(reference.size_n[reference.size_n != ""], return_counts=True)
    usual = sizes[counts >= USUAL_SHARE * len(reference)]
    if not len(usual) or np.isin(reference.size_n, usual).mean() < MOSTLY:
        return Check("size", "broken", "fine", "the reference has images of many sizes")
    share = float(np.isin(window.size_n, usual).mean())
    others, numbers = np.unique(window.size_n[~np.isin(window.size_n, usual)], return_counts=True)
    told = f", most others {others[numbers.argmax()]}" if len(others) else ""
    state: State = "alert" if share < 0.5 else "fine"
    expected = f"half or more: {', '.join(map(str, usual[:3]))}"
    return Check("size", "broken", state, f"{100 * share:.0f} % have a usual size{told}", expected, share, 0.5)


def check_requests(counts: RequestCounts | None, section: Monitor, *, has_images: bool) -> list[Check]:
    """Return the checks of requests that were refused or failed; None: the servers have left no counts."""
    if counts is None:
        found = "the servers have left no counts of their requests"
        return [Check("requests", "service", "unknown", found)] if has_images else []
    return [
        _check_requests("refused", counts.refused, counts.total, section.max_refused_share),
        _check_requests("errors", counts.errors, counts.total, section.max_error_share),
    ]


def _check_requests(name: str, number: int, total: int, most: float) -> Check:
    share = number / max(total, 1)
    state: State = "alert" if share > most and number >= MIN_REQUESTS else "fine"
    what = "were refused (429, 503)" if name == "refused" else "failed (5xx)"
    found = f"{number:,} of {total:,} requests {what}"
    return Check(name, "service", state, found, f"at most {100 * most:g} %", share, most)


def check_colours(window_n3: FloatArray, reference_g3: FloatArray) -> Check:
    """Say whether images lost their colours, or have red and blue swapped, by the mean colours of some (0 to 255).

    Example: the mean colour of the reference is (140, 120, 90), that of the window (91, 119, 141): nearer to the
    reference with red and blue swapped than as it is.
    """
    if min(len(window_n3), len(reference_g3)) < MIN_PICTURES:
        return Check(
            "colours", "broken", "unknown", "too few kept images to tell", f"{MIN_PICTURES} in window and reference"
        )
    grey, usual = (float((np.ptp(rgb, axis=1) < GREY_SPREAD).mean()) for rgb in (window_n3, reference_g3))
    if grey > 0.5 and usual <= 0.1:
        found = f"{100 * grey:.0f} % of the kept images are grey, {100 * usual:.0f} % of the reference"
        return Check("colours", "broken", "alert", found, "colours", grey, 0.5)
    mean_3, before_3 = window_n3.mean(axis=0), reference_g3.mean(axis=0)
    plain, swapped = float(np.abs(mean_3 - before_3).mean()), float(np.abs(mean_3[::-1] - before_3).mean())
    tint = abs(float(before_3[0] - before_3[2]))
    told = f"mean colour {_tell(mean_3)}, of the reference {_tell(before_3)}"
    if tint >= MIN_COLOUR_GAP and swapped < plain / 3 and plain > tint / 2:
        return Check("colours", "broken", "alert", f"{told}: red and blue seem to be swapped", "the colours as before")
    return Check("colours", "broken", "fine", told)


def _tell(rgb_3: FloatArray) -> str:
    return f"({', '.join(f'{one:.0f}' for one in rgb_3)})"


def _check_volume(number: int, volumes: Sequence[int], most: float) -> Check:
    if len(volumes) < 3:
        return Check("volume", "service", "unknown", f"{number:,} images", "three windows before it to compare with")
    usual = float(np.median(volumes))
    ratio = number / max(usual, 1.0)
    state: State = "alert" if not 1 / most <= ratio <= most else "fine"
    expected = f"{usual / most:,.0f} to {usual * most:,.0f} (median {usual:,.0f})"
    return Check("volume", "service", state, f"{number:,} images", expected, ratio, most)


def _check_latency(window: Traffic, most: float | None) -> list[Check]:
    known_n = window.latency_n[np.isfinite(window.latency_n)]
    if most is None or not len(known_n):
        return []
    value = float(np.quantile(known_n, 0.95))
    state: State = "alert" if value > most else "fine"
    return [
        Check(
            "latency",
            "service",
            state,
            f"{value:,.0f} ms for 95 % of the images",
            f"at most {most:,.0f} ms",
            value,
            most,
        )
    ]


def check_model(
    *,
    age_days: float,
    max_age_days: float | None,
    served: int,
    others: int,
    version: str,
    alias: str | None,
    alias_problem: str = "",
) -> list[Check]:
    """Return the checks of the model: who answered, its age, and whether MLflow's alias is that of the ledger.

    `served` images were answered by the champion, `others` by other models. `alias_problem` says why the alias could
    not be read.
    """
    share = others / max(1, served + others)
    checks = [
        Check(
            "served_model",
            "service",
            "alert" if share > 0.5 else "fine",
            f"{100 * share:.0f} % of the images were answered by another model than the champion",
            "at most 50 %",
            share,
            0.5,
        )
    ]
    if max_age_days is not None:
        state: State = "alert" if age_days > max_age_days else "fine"
        found, expected = f"the champion is {age_days:.0f} days old", f"at most {max_age_days:g}"
        checks.append(Check("model_age", "service", state, found, expected, age_days, max_age_days))
    if alias_problem:
        return [*checks, Check("alias", "service", "unknown", alias_problem)]
    found = f"MLflow's alias `champion` is on version {alias or 'none'}"
    state = "fine" if alias == version else "alert"
    return [*checks, Check("alias", "service", state, found, f"version {version}, by the ledger")]
