"""The report of a retrain: what it says, that it stands alone, and that a browser shows it on a phone."""

import base64
import io
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import CHROMIUM, browsing
from fakes import make_card
from visionloop.data.compare import compare_records
from visionloop.evaluation.answers import Answers, compute_answer_metrics
from visionloop.evaluation.slices import Slice
from visionloop.params import Evaluate
from visionloop.promotion.drawings import choose_span, draw_strip, encode_picture
from visionloop.promotion.report import Judged, RetrainFacts, choose_pictures, make_retrain_report
from visionloop.records import Decision, Interval, RuleResult


def make_answers(labels: np.ndarray, chosen: np.ndarray, classes: tuple[str, ...], confidence: float = 0.8) -> Answers:
    probs = np.full((len(labels), len(classes)), (1 - confidence) / max(1, len(classes) - 1))
    probs[np.arange(len(labels)), chosen] = confidence
    return Answers(labels, probs, chosen, classes, np.arange(len(labels)))


def make_facts(
    classes: tuple[str, ...], number: int, *, with_champion: bool = True, verdict: str = "passed", **more: object
) -> RetrainFacts:
    """The champion is wrong on every fifth image, the candidate on every seventh."""
    card = make_card(classes, task="multiclass")
    labels = np.arange(number) % len(classes)
    wrong = (labels + 1) % len(classes)
    answers = [
        make_answers(labels, np.where(np.arange(number) % step == 0, wrong, labels), classes, confidence)
        for step, confidence in ((7, 0.9), (5, 0.6))
    ]
    metrics = [
        {name: figure.to_json() for name, figure in compute_answer_metrics(one, Evaluate(resamples=100)).items()}
        for one in answers
    ]
    decision = Decision(
        name="pets",
        number=7,
        verdict=verdict,
        candidate="c" * 64,
        champion="d" * 64 if with_champion else None,
        test_digest="",
        num_test=number,
        rules=(RuleResult("class_drop", None, f"the largest drop is {classes[0]}", "no drop"),),
        metrics=metrics[0],
        champion_metrics=metrics[1] if with_champion else {},
        state={},
        dataset={"name": "pets", "version": 4, "digest": "e" * 64},
        run_id=None,
        decided_at="2026-11-28T20:11:00Z",
    )
    return RetrainFacts(
        decision=decision,
        candidate=Judged("c" * 64, replace(card, params={"train": {"seed": 1, "learning_rate": 0.1}}), answers[0]),
        champion=Judged("d" * 64, replace(card, params={"train": {"seed": 1, "learning_rate": 0.3}}), answers[1])
        if with_champion
        else None,
        sha256_n=[f"{row:064d}" for row in range(number)],
        origins=[f"photos/{row}.jpg" for row in range(number)],
        **more,  # type: ignore[arg-type]
    )


def render(facts: RetrainFacts, size: tuple[int, int] = (16, 12)) -> str:
    picture = encode_picture(Image.new("RGB", size, "red"))
    return make_retrain_report(facts, dict.fromkeys(choose_pictures(facts), picture))


def read_text(page: str) -> str:
    words: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            words.append(data)

    Reader().feed(page)
    return " ".join(" ".join(words).split())


def test_images_whose_verdict_changed_are_shown_both_ways() -> None:
    facts = make_facts(("cat", "dog"), 70)
    page = render(facts)
    # 70 images: 10 wrong now, 14 wrong before, 2 (0 and 35) both times.
    text = read_text(page)
    assert "Wrong now, right before: 8 " in text
    assert "Right now, wrong before: 12 " in text
    assert page.count('title="photos/') == 20
    assert "photos/7.jpg" in page and "photos/5.jpg" in page
    assert "photos/35.jpg" not in page and "photos/1.jpg" not in page
    assert "dog now cat 90% before dog 60%" in text
    assert f'data-image="{7:064d}"' in page


def test_the_verdict_comes_first_and_settings_that_differ_are_named() -> None:
    text = read_text(render(make_facts(("cat", "dog"), 70, verdict="refused")))
    assert text.index("Refused: the champion stays") < text.index("The rules") < text.index("Figures")
    assert "class drop cannot tell the largest drop is cat expected: no drop" in text
    assert "train.learning_rate 0.3 0.1" in text
    assert "train.seed" not in text
    assert "cat 35 85.7 %" in text
    assert "+5.7" in text


def test_without_a_champion_nothing_is_compared() -> None:
    text = read_text(render(make_facts(("cat", "dog"), 70, with_champion=False, verdict="inconclusive")))
    assert "There was no champion to compare with." in text
    assert "before:" not in text
    assert "Inconclusive: the data cannot tell pets" in text


def test_a_champion_that_has_no_answers_is_not_called_none() -> None:
    facts = make_facts(("cat", "dog"), 70, with_champion=False, verdict="refused")
    broken = replace(facts, decision=replace(facts.decision, champion="d" * 64))
    text = read_text(render(broken))
    assert "Refused: the champion stays" in text
    assert "The champion could not be asked here, so nothing was compared: the rules say why." in text
    assert "There was none." not in text and "no champion to compare with" not in text
    is_it = RuleResult("better", None, "the candidate is the champion itself", "another model")
    same = replace(facts.decision, champion=facts.decision.candidate, verdict="inconclusive", rules=(is_it,))
    text = read_text(render(replace(facts, decision=same)))
    assert "The candidate is the champion itself: nothing moves" in text
    assert "It is the champion itself, so there is nothing to compare with." in text
    assert "cannot tell, so" not in text and "There was none." not in text


def test_a_figure_that_one_model_has_not_is_a_dash() -> None:
    facts = make_facts(("cat", "dog"), 70)
    figure, told = {"answered": {"value": 0.5, "low": 0.4, "high": 0.6}}, "50.0 % (40.0 … 60.0)"
    ours = replace(facts.decision, metrics=figure, champion_metrics={})
    assert f"Answered {told} \N{EN DASH}" in read_text(render(replace(facts, decision=ours)))
    theirs = replace(facts.decision, metrics={}, champion_metrics=figure)
    assert f"Answered \N{EN DASH} {told}" in read_text(render(replace(facts, decision=theirs)))


def test_names_are_escaped_and_nothing_is_loaded() -> None:
    hostile = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    facts = make_facts((hostile, "猫", "كلب"), 60, origin={"who": hostile}, leaks={"across": 2})
    page = render(facts)
    assert "<script" not in page
    assert "onerror" in read_text(page)
    assert set(re.findall(r'src="([^"]{0,14})', page)) == {"data:image/png"}
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org)", re.sub(r'src="[^"]*"', "", page))


def test_many_classes_fit_into_a_file_and_the_rest_is_folded() -> None:
    classes = tuple(f"breed {i}" for i in range(120))
    number = 1200
    page = render(make_facts(classes, number, slices=[Slice("source=a", np.arange(400))]))
    assert len(page.encode()) < 5_000_000
    assert "90 more" in read_text(page)
    assert page.count("<bdi>breed 119</bdi>") >= 1


def test_the_data_that_changed_is_told() -> None:
    assert "0 images added, 0 removed" in read_text(render(make_facts(("a", "b"), 40, diff=compare_records([], []))))


def test_bounds_that_read_the_same_draw_a_point() -> None:
    interval = Interval(0.00012, 0.00003, 0.00031)
    drawn = draw_strip({"candidate": interval}, choose_span([interval]))
    left, right = map(float, re.findall(r'x[12]="([\d.]+)"', drawn))
    assert 0 < right - left < 7, "no wider than its dot"


@pytest.mark.parametrize(
    ("size", "expected", "kind"),
    [
        ((8, 8), (120, 120), "png"),
        ((32, 20), (96, 60), "png"),
        ((61, 61), (61, 61), "jpeg"),
        ((300, 300), (280, 280), "jpeg"),
        ((1024, 768), (280, 210), "jpeg"),
        ((3000, 2), (280, 1), "jpeg"),
    ],
)
def test_a_picture_is_enlarged_by_whole_factors_alone(
    size: tuple[int, int], expected: tuple[int, int], kind: str
) -> None:
    image = Image.new("RGBA", size, "red")
    image.putpixel((0, 0), (0, 0, 255, 255))
    head, _, data = encode_picture(image).partition(",")
    assert head == f"data:image/{kind};base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.size == expected
        if kind == "png":
            factor = expected[0] // size[0]
            blue = (np.asarray(shown) == (0, 0, 255)).all(axis=2)
            assert blue.sum() == factor**2, "each pixel is a sharp square"


def test_a_browser_shows_no_picture_larger_than_it_is(tmp_path: Path) -> None:
    page, found = tmp_path / "report.html", {}
    with browsing() as browser:
        for size in ((32, 32), (90, 60), (1024, 768)):
            page.write_text(render(make_facts(("cat", "dog"), 70), size), encoding="utf-8")
            browser.open(f"{page.as_uri()}?{size[0]}")
            found[size] = browser.run(
                "[...document.querySelectorAll('.photo img')].map(i => [i.naturalWidth, i.naturalHeight,"
                " getComputedStyle(i).objectFit, getComputedStyle(i).imageRendering].join(' '))"
            )
    assert {size: set(rows) for size, rows in found.items()} == {
        (32, 32): {"96 96 scale-down pixelated"},
        (90, 60): {"90 60 scale-down auto"},
        (1024, 768): {"280 210 scale-down auto"},
    }
    assert len(found[32, 32]) > 20, "of the changed, and of the sheet"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    "classes", [("cat", "dog"), ("猫", "كلب", *(f"a rather long name of a breed {i}" for i in range(118)))]
)
def test_a_browser_shows_it_at_the_width_of_a_phone(tmp_path: Path, classes: tuple[str, ...]) -> None:
    (tmp_path / "report.html").write_text(render(make_facts(classes, 240)), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        '<iframe src="report.html" width="390" height="800" style="border:0"></iframe><script>onload = () => {'
        "const root = document.querySelector('iframe').contentDocument.documentElement, body = document.body;"
        "body.dataset.hidden = root.scrollWidth - root.clientWidth;"
        "body.dataset.sideways = [...root.querySelectorAll('.table')]"
        ".filter(each => each.scrollWidth > each.clientWidth).length;"
        "body.dataset.title = root.querySelector('h1').innerText }</script>"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert 'data-hidden="0"' in page
    assert 'data-sideways="0"' in page, "no table is to be scrolled sideways"
    assert 'data-title="Passed: the candidate may replace the champion"' in page
