"""The page that asks for labels: in a browser, killed, and asked by those who may not."""

import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from browser import browsing
from fakes import make_image
from visionloop.data.answers import LOG, SUSPECTS, Asked, Batch, create_batch, load_opinions, write_answers
from visionloop.data.manifest import make_image_key
from visionloop.monitoring.review_page import ReviewPage
from visionloop.params import make_params
from visionloop.store import LocalStore
from visionloop.workspace import Workspace, connect
from workspaces import make_settings, store_image

NAME = "pets"
EVIL = "</script><b>cat</b>"


@dataclass
class Asking:
    """A batch of eight images on a page that is served here; the model says EVIL to the first four, dog to the rest."""

    place: Workspace
    batch: Batch
    page: ReviewPage

    def ask(
        self, path: str, body: Any = None, *, token: str | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        address = urlsplit(self.page.url)
        host = f"127.0.0.1:{address.port}"
        client = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=20)
        own = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"}
        own |= {name.replace("_", "-"): value for name, value in headers.items()}
        place = f"/{token}/" if token is not None else address.path
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        client.request("GET" if data is None else "POST", f"{place}{path}", data, own)
        answer = client.getresponse()
        return answer.status, answer.headers, answer.read()

    def said(self) -> dict[int, tuple[str, tuple[str, ...]]]:
        """What is stored, by the number of the image."""
        place = {one.sha256: number for number, one in enumerate(self.batch.images)}
        return {place[one.asked.sha256]: (one.verdict, one.labels) for one in load_opinions(self.place.store, NAME)}


def make_place(home: Path) -> tuple[Workspace, Batch]:
    store = LocalStore(home / "store")
    place = connect(make_settings(home), make_params({"name": NAME}), store=store)
    rows = [store_image(store, number, data=make_image(number, size_hw=(60, 90))) for number in range(9)]
    like = ({"sha256": rows[8].sha256, "labels": ["dog"]},)
    images = tuple(
        Asked(row.sha256, "", "", (EVIL if number < 4 else "dog",), 0.6, "novel", similar=like)
        for number, row in enumerate(rows[:8])
    )
    batch = Batch(1, LOG, datetime.now(UTC).isoformat(), "ann", "multiclass", (EVIL, "dog"), images)
    assert create_batch(store, NAME, batch)
    return place, batch


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Asking]:
    place, batch = make_place(tmp_path)
    page = ReviewPage(place, batch, by="ann", after="Run `visionloop ingest`.")
    thread = threading.Thread(target=page.serve, daemon=True)
    thread.start()
    yield Asking(place, batch, page)
    page.stop()
    thread.join(10)


def answer(batch: Batch, number: int, label: str = "dog") -> dict[str, Any]:
    return {"answers": [{"sha256": batch.images[number].sha256, "verdict": "label", "labels": [label]}]}


def test_browser_answers_takes_back_and_confirms(asking: Asking) -> None:
    with browsing() as tab:
        tab.open(asking.page.url, width=390, height=844)
        tab.wait("document.getElementById('big')?.naturalWidth === 90")
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
        assert tab.run("document.querySelectorAll('#classes button, #similar img').length") == 3
        assert EVIL in tab.run("document.body.innerText") and not tab.run("document.querySelector('main b')")
        count = "document.getElementById('count')?.textContent"

        tab.press("1")
        tab.wait(f"{count} === '1 of 8 answered'")
        assert asking.said() == {0: ("label", (EVIL,))}
        tab.press("2")
        tab.wait(f"{count} === '2 of 8 answered'")
        tab.press("z")
        tab.wait(f"{count} === '1 of 8 answered'")
        assert asking.said()[1] == ("undo", ())
        tab.press("x")
        tab.wait(f"{count} === '2 of 8 answered'")
        tab.press("s")
        tab.wait(f"{count} === '3 of 8 answered'")
        tab.press("Enter")
        tab.wait(f"{count} === '4 of 8 answered'")
        assert asking.said() == {
            **{0: ("label", (EVIL,)), 1: ("not_ours", ())},
            **{2: ("skip", ()), 3: ("label", (EVIL,))},
        }

        tab.press("/")
        tab.run("document.activeElement.value = 'fox'; document.activeElement.dispatchEvent(new Event('input'))")
        assert tab.run("document.querySelector('#classes button').textContent") == "New class “fox”"
        tab.press("Enter")
        tab.wait(f"{count} === '5 of 8 answered'")
        assert asking.said()[4] == ("label", ("fox",))

        tab.press("g")
        tab.wait("document.querySelectorAll('.tiles button').length === 3")
        tab.run("document.querySelector('.tiles button').click()")
        assert tab.run("document.querySelector('#grid h2 button').textContent") == "Confirm 2 as dog"
        tab.run("document.querySelector('#grid h2 button').click()")
        tab.wait(f"{count} === '7 of 8 answered'")
        assert asking.said() | {6: ("label", ("dog",)), 7: ("label", ("dog",))} == asking.said()
        assert 5 not in asking.said()

        tab.open(asking.page.url)  # again: it goes on where it was
        tab.wait(f"{count} === '7 of 8 answered'")
        assert tab.run("document.getElementById('big').alt") == "image 6 of 8"
        for key in asking.place.store.list("images/"):
            asking.place.store.delete(key)
        tab.press("1")
        said = "document.getElementById('said').textContent"
        tab.wait(f"{said}.startsWith('Not stored: the image is gone')")
        tab.press("s")
        tab.wait("!document.getElementById('done').hidden")


def test_marked_wrong_images_stay_open_and_marked_after_a_double_click_on_confirm(asking: Asking) -> None:
    """The second click falls on what moved under the mouse: it stores nothing, neither those marked nor the others."""
    marked = "[...document.querySelectorAll('.tiles button[aria-pressed=false]')].length"
    confirm = "document.querySelector('#grid h2 button')"
    with browsing() as tab:
        tab.open(asking.page.url)
        tab.wait("document.getElementById('big')?.naturalWidth === 90")
        tab.press("g")
        tab.wait("document.querySelectorAll('.tiles button').length === 8")
        tab.run("[...document.querySelectorAll('.tiles button')].slice(1, 4).forEach(one => one.click())")
        first, others = set(range(4)), set(range(4, 8))
        tab.run(f"{confirm}.click()")
        tab.wait("document.getElementById('count').textContent === '1 of 8 answered'")
        tab.run("document.querySelectorAll('#grid h2 button').forEach(one => one.click())")
        assert tab.run(marked) == 3
        assert tab.run(f"[{confirm}.disabled, {confirm}.textContent]") == [True, "All are marked wrong"]
        tab.wait("performance.now() > restUntil")
        assert asking.said().keys() < first and len(asking.said()) == 1
        tab.run("document.querySelectorAll('#grid h2 button').forEach(one => one.click())")
        tab.wait("document.getElementById('count').textContent === '5 of 8 answered'")
        assert asking.said().keys() > others and len(asking.said()) == 5
        assert tab.run(marked) == 3


def test_browser_chooses_several_labels(tmp_path: Path) -> None:
    place, batch = make_place(tmp_path)
    several = replace(batch, task="multilabel", number=2, kind=SUSPECTS)
    assert create_batch(place.store, NAME, several)
    page = ReviewPage(place, several, by="ann")
    threading.Thread(target=page.serve, daemon=True).start()
    with browsing() as tab:
        tab.open(page.url)
        tab.wait("document.getElementById('big')?.naturalWidth === 90")
        tab.press("2")
        tab.press("Enter")
        tab.wait("document.getElementById('count').textContent === '1 of 8 answered'")
    page.stop()
    (one,) = load_opinions(place.store, NAME)
    assert (one.labels, one.kind, one.asked.sha256) == (
        tuple(sorted((EVIL, "dog"))),
        SUSPECTS,
        several.images[0].sha256,
    )


def test_others_neither_read_nor_answer(asking: Asking) -> None:
    """No page of elsewhere, no other name for this machine, nobody without the address."""
    good = answer(asking.batch, 0)
    for status, given in (
        (404, {"token": "x" * 32}),
        (404, {"token": ""}),
        (403, {"Origin": "https://evil.example"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": ""}),
        (403, {"Host": "evil.example"}),
        (403, {"Host": "evil.example:80", "Origin": "http://evil.example:80"}),
        (415, {"Content_Type": "text/plain"}),
    ):
        assert asking.ask("answer", good, **given)[0] == status, given
    assert asking.said() == {}
    for given in ({"token": "x"}, {"Host": "evil.example"}):
        for path in ("", "state", f"image/{asking.batch.images[0].sha256}"):
            assert asking.ask(path, **given)[0] in (403, 404)
    assert asking.ask("answer", good)[0] == 200
    assert asking.said() == {0: ("label", ("dog",))}


def test_headers_keep_the_page_by_itself(asking: Asking) -> None:
    status, headers, page = asking.ask("")
    policy = headers["Content-Security-Policy"]
    assert (
        status == 200
        and "default-src 'none'" in policy
        and "unsafe" not in policy
        and "frame-ancestors 'none'" in policy
    )
    assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"
    assert b"http://" not in page and b"https://" not in page
    assert asking.ask("")[1]["Content-Security-Policy"] != policy
    status, headers, data = asking.ask(f"image/{asking.batch.images[0].sha256}")
    assert (status, headers["Content-Type"], data[:2]) == (200, "image/jpeg", b"\xff\xd8")


def test_bad_requests_are_told_and_store_nothing(asking: Asking) -> None:
    one = asking.batch.images[0].sha256
    bad: list[tuple[int, Any]] = [
        (400, b"{"),
        (400, b"[" * 5000),
        (400, {"answers": []}),
        (400, {"answers": [1]}),
        (400, {"answers": [{"sha256": "f" * 64, "verdict": "label", "labels": ["dog"]}]}),
        (400, {"answers": [{"sha256": [], "verdict": "label"}]}),
        (400, {"answers": [{"sha256": one, "verdict": "dog"}]}),
        (400, {"answers": [{"sha256": one, "verdict": "label", "labels": "dog"}]}),
        (422, {"answers": [{"sha256": one, "verdict": "label", "labels": []}]}),
        (422, {"answers": [{"sha256": one, "verdict": "label", "labels": ["fox"]}]}),
        (422, {"answers": [{"sha256": one, "verdict": "label", "labels": ["dog", EVIL]}]}),
        (422, {"answers": [{"sha256": one, "verdict": "label", "labels": ["a\x00b"], "new": True}]}),
    ]
    for status, body in bad:
        found, _, said = asking.ask("answer", body)
        assert (found, list(json.loads(said))) == (status, ["error"]), body
    assert asking.ask("answer", b"{}", Content_Length="999999999")[0] == 413
    for path in ("image/../../etc/passwd", "image/", "nothing", f"image/{'f' * 64}"):
        assert asking.ask(path)[0] == 404
    assert asking.ask("elsewhere", {})[0] == 404
    asking.place.store.put(make_image_key(one), b"no image")
    assert asking.ask(f"image/{one}")[0] == 410
    assert asking.said() == {}


def test_what_others_answered_is_done_and_not_told(asking: Asking) -> None:
    sha256 = asking.batch.images[2].sha256
    write_answers(asking.place.store, NAME, asking.batch, {sha256: ("label", ("dog",))}, by="bob", via="page")
    images = json.loads(asking.ask("state")[2])["images"]
    assert [(one["answer"], one["others"]) for one in images[1:3]] == [(None, 0), (None, 1)]


SERVER = """
import sys
from pathlib import Path
from visionloop.data.answers import load_batches
from visionloop.monitoring.review_page import ReviewPage
from visionloop.params import make_params
from visionloop.store import LocalStore
from visionloop.workspace import connect
from workspaces import make_settings

home = Path(sys.argv[1])
place = connect(make_settings(home), make_params({"name": "pets"}), store=LocalStore(home / "store"))
page = ReviewPage(place, load_batches(place.store, "pets")[0], by="ann")
print(page.url, flush=True)
page.serve()
"""


def test_answer_that_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    place, batch = make_place(tmp_path)
    for number in range(2):
        command = [sys.executable, "-c", SERVER, str(tmp_path)]
        paths = {"PYTHONPATH": str(Path(__file__).parents[1] / "support")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=paths)
        assert process.stdout is not None
        address = urlsplit(process.stdout.readline().strip())
        client = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=20)
        headers = {"Origin": f"http://127.0.0.1:{address.port}", "Content-Type": "application/json"}
        client.request("POST", f"{address.path}answer", json.dumps(answer(batch, number)).encode(), headers)
        assert client.getresponse().status == 200
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        process.stdout.close()
        assert len(load_opinions(place.store, NAME)) == number + 1
