"""The page for people, in headless Chromium: drop a photo, read the answer, correct it, find the correction."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, browsing
from fakes import make_bundle, make_image, run_here, write_photos
from model_server import Server, serving, wait_for
from videos import BLUE, GREEN, RED, Film, write_video
from visionloop.data.manifest import load_version
from visionloop.data.parts import load_version_records
from visionloop.data.prediction_log import join_feedback, read_feedback, read_predictions
from visionloop.predictor import Predictor
from visionloop.serving.keys import add_key
from visionloop.settings import Settings
from visionloop.store import LocalStore

HOSTILE = "<script>document.title='caught'</script>"
NAMES = (HOSTILE, "قطة سوداء", "猫", *(f"class {number}" for number in range(117)))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    make_bundle(folder / "bundle", classes=tuple(sorted(NAMES)))
    (folder / "photo one.png").write_bytes(make_image(1, size_hw=(60, 80)))
    (folder / "notes.txt").write_text("no image")
    write_video(folder / "film.mp4", Film((RED, GREEN, BLUE), 1.0))
    return folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with serving(home, home / "bundle", log_flush_s=0.2) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def page(server: Server, browser: Browser) -> Iterator[Browser]:
    browser.complaints.clear()
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.wait("document.querySelector('#model').textContent.includes('120 classes')")
    yield browser
    assert browser.complaints == [], "no error, and nothing that the page's own policy refuses"


def read(page: Browser, selector: str) -> str:
    page.wait(f"document.querySelector({selector!r})")
    return str(page.run(f"document.querySelector({selector!r}).innerText"))


def test_a_photo_is_dropped_answered_corrected_and_the_correction_is_in_the_log(page: Browser, home: Path) -> None:
    page.drop("#drop", home / "photo one.png")
    [expected] = Predictor.load(home / "bundle", threads=1).predict([(home / "photo one.png").read_bytes()])
    assert read(page, ".card h3") == f"{expected.prediction} {100 * expected.confidence:.1f} %"
    assert len(re.findall(r"\d %", read(page, ".bars"))) == 5
    page.click(".ask button", "Another")
    page.run("document.querySelector('.ask input').value = 'SCRIPT'")
    page.run("document.querySelector('.ask input').dispatchEvent(new Event('input'))")
    page.click(".found button", HOSTILE)
    assert read(page, ".ask .good") == (
        f"Thank you. Noted: {HOSTILE}. The picture itself is not kept, so no model is trained on it."
    )
    assert read(page, "#session").endswith("are kept in this page alone, until you leave it.")
    page.click(".ask button", "Undo")
    page.wait(f"document.querySelector('.ask .good').innerText.includes({expected.prediction!r})")
    page.click(".ask button", "Change it")
    page.click(".ask button", "Another")
    page.run("document.querySelector('.ask input').value = '猫'")
    page.run("document.querySelector('.ask input').dispatchEvent(new Event('input'))")
    page.click(".found button", "猫")
    page.wait("document.querySelector('.ask .good')?.innerText.includes('猫')")
    assert page.run("document.title") == "fake: ask the model", "no class name is run"
    store = LocalStore(home / "store")
    wait_for(lambda: len(read_predictions(store, "fake").table) == 1)
    joined = join_feedback(read_predictions(store, "fake").table, read_feedback(store, "fake").table)
    [row] = joined.to_pylist()
    assert row["prediction"] == expected.prediction
    assert "猫" in str(row)
    assert len(read_feedback(store, "fake").table) == 3, "each is kept; the newest counts"


def test_a_correction_on_the_page_is_a_label_of_the_next_dataset_version(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person drops a photo, reads the answer and corrects it; another accepts, and ingests: as docs/loop.md says."""

    def visionloop(*words: str) -> str:
        assert run_here(monkeypatch, *words) == 0, capsys.readouterr()
        return capsys.readouterr().out

    write_photos(tmp_path / "photos", 6, classes=("cat", "dog"))
    sources = "[{kind: folder, path: photos}, {kind: feedback}]"
    (tmp_path / "params.yaml").write_text(f"name: fake\ningest: {{sources: {sources}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONLOOP_STORE", (tmp_path / "store").as_uri())
    assert "version 1: 12 new images" in visionloop("ingest")
    make_bundle(tmp_path / "bundle", classes=("cat", "dog"))
    (tmp_path / "mine.png").write_bytes(photo := make_image(77))
    store = LocalStore(tmp_path / "store")
    with serving(tmp_path, tmp_path / "bundle", log_flush_s=0.2, keep_images={"random": 1.0}) as server:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.drop("#drop", tmp_path / "mine.png")
        said = read(browser, ".card h3").split()[0]
        meant = {"cat": "dog", "dog": "cat"}[said]
        browser.click(".ask button", meant)
        assert read(browser, ".ask .good") == f"Thank you. Noted: {meant}."
        assert read(browser, "#session").endswith(
            "The server keeps some of the pictures that it is sent, to be learned from."
        )
        wait_for(lambda: len(read_feedback(store, "fake").table) == len(read_predictions(store, "fake").table) == 1)
    assert visionloop("review", "--accept").startswith("accepted: 1 label")
    told = visionloop("ingest")
    assert "version 2: 1 new images, 13 in all" in told
    row = next(
        r
        for r in load_version_records(store, load_version(store, "fake", 2))
        if r.sha256 == hashlib.sha256(photo).hexdigest()
    )
    assert (row.labels, row.sources) == ((meant,), ("feedback",))
    assert row.side in ("train", "val"), "what people send judges no model"


def test_it_shows_where_the_model_looks_and_what_is_similar(page: Browser, home: Path) -> None:
    page.drop("#drop", home / "photo one.png")
    page.click(".tools button", "Where it looks")
    page.wait("document.querySelector('.shot img[alt^=\"Heat map\"]')?.naturalWidth == 32")
    page.click(".tools button", "Where it looks")
    page.wait("document.querySelector('.shot img').alt == 'photo one.png'")
    page.click(".tools button", "Similar images")
    assert len(re.findall("distance", read(page, ".near"))) == 6


def test_a_video_has_a_timeline_and_what_is_no_image_has_a_plain_word(page: Browser, home: Path) -> None:
    page.drop("#drop", home / "film.mp4", home / "notes.txt")
    assert "0:00 \u2013 0:0" in read(page, ".parts")
    page.wait("[...document.querySelectorAll('.bad')].some(e => e.innerText.startsWith('This is not an image'))")
    assert page.run("document.body.innerText.match(/JPEG/g).length") == 1, "one list of formats, that of the server"
    assert read(page, ".bad + .small").startswith("is text, not an image; expected JPEG")
    assert not page.run("document.body.innerText.includes('Try again')"), "the same file gets the same answer"
    page.wait("document.querySelectorAll('#history button').length == 2")
    page.click("#clear")
    page.wait("!document.querySelector('.card') && document.querySelector('#session').hidden")


def test_the_headline_of_a_video_says_for_how_much_of_the_time(page: Browser) -> None:
    times = [{"start_s": s, "end_s": s + 5, "prediction": p, "labels": None, "abstained": None, "confidence": 0.9999}
             for s, p in ((0, "cat"), (5, "dog"))]  # fmt: skip
    answer = {"prediction": "cat", "labels": None, "confidence": 0.9999, "abstained": None, "duration_s": 10}
    answer |= {"segments": times, "shares": {"cat": 0.506, "dog": 0.494}, "num_frames": 20, "every_s": 0.5}
    answer |= {"smooth_s": 1, "notes": [], "model": {"name": "m", "version": None, "engine": "x"}}
    page.run(
        "void import('/page/cards.js').then(m => {"
        " const card = new m.Card(new File([], 'a.mp4', {type: 'video/mp4'}), () => [], () => {});"
        f" card.showTimes({json.dumps(answer)}); window.head = card.text.querySelector('h3').textContent; }})"
    )
    page.wait("window.head")
    assert page.run("window.head") == "cat, 51 % of the time"


def test_a_phone_has_a_camera_and_nothing_is_wider_than_it(page: Browser, server: Server, home: Path) -> None:
    page.open(f"http://127.0.0.1:{server.port}/", width=390, height=800)
    assert page.run("getComputedStyle(document.querySelector('.touch')).display") != "none"
    page.drop("#drop", home / "photo one.png", home / "film.mp4")
    page.wait("document.querySelector('.bars') && document.querySelector('.parts')")
    assert page.run("document.documentElement.scrollWidth") == 390


def test_everything_has_a_name_for_who_does_not_see_it(page: Browser, home: Path) -> None:
    page.drop("#drop", home / "photo one.png")
    read(page, ".bars")
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    asked = ("button", "link", "image", "textbox", "searchbox")
    nameless = [n for n in tree if not n["ignored"] and n["role"]["value"] in asked and not n["name"].get("value")]
    assert nameless == []
    assert "photo one.png: " in page.run("document.querySelector('[role=status]').textContent")


def test_a_server_with_keys_asks_for_one_and_keeps_it_in_the_tab(home: Path, tmp_path: Path, browser: Browser) -> None:
    settings = Settings(home=tmp_path, store_url="", tracking_uri="", artifact_root="")
    key = add_key(settings.keys_path, name="page", roles=["predict"], now="2026-01-01T00:00:00Z", by="me")
    with serving(tmp_path, home / "bundle") as server:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait("!document.querySelector('#key-form').hidden")
        assert read(browser, "#model") == "This server asks for a key."
        browser.run(f"document.querySelector('#key').value = {key!r}")
        browser.click("#key-form button")
        browser.wait("document.querySelector('#model').textContent.includes('120 classes')")
        browser.drop("#drop", home / "photo one.png")
        assert read(browser, ".bars")
        kept = browser.run("[sessionStorage.length, localStorage.length, document.cookie]")
        assert kept == [1, 0, ""]
