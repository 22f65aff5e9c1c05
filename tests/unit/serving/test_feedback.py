"""What people say of answers: what is taken, what is refused and why, and that it is in the store when it is taken."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import visionloop.serving.feedback as module
from fakes import make_bundle, make_image
from visionloop.data.prediction_log import join_feedback, make_request_id, read_feedback, read_predictions
from visionloop.errors import StoreError
from visionloop.params import KeepImages, Serve
from visionloop.predictor import Predictor
from visionloop.serving.app import make_app
from visionloop.serving.body import Limits
from visionloop.serving.feedback import MAX_BODY_BYTES, FeedbackBook
from visionloop.serving.log import PredictionLog
from visionloop.serving.swap import ModelSlot, ServedModel
from visionloop.store import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def make_client(store: LocalStore, folder: Path, task: str | None = None, **serve: Any) -> TestClient:
    if not folder.exists():
        make_bundle(folder, task=task)
    slot = ModelSlot(ServedModel(Predictor.load(folder, threads=1)))
    book = FeedbackBook("pets", store, Serve.model_validate(serve))
    return TestClient(make_app(slot, book=book), raise_server_exceptions=False)


@pytest.fixture
def client(store: LocalStore, bundle_dir: Path) -> Iterator[TestClient]:
    with make_client(store, bundle_dir) as client:
        yield client


def new_id(days_ago: float = 0.0) -> str:
    return make_request_id((datetime.now(UTC) - timedelta(days=days_ago)).timestamp())


def read(store: LocalStore) -> list[tuple[Any, ...]]:
    rows = read_feedback(store, "pets").table.to_pylist()
    return [(row["request_id"], row["labels"], row["is_new"], row["who"]) for row in rows]


def test_feedback_is_in_the_store_when_it_is_answered(client: TestClient, store: LocalStore) -> None:
    one = new_id()
    answer = client.post("/feedback", json={"request_id": one, "label": "b", "who": "eve"})
    assert (answer.status_code, answer.json()) == (200, {"request_id": one, "labels": ["b"], "status": "taken"})
    assert read(store) == [(one, ["b"], False, "eve")]


def test_the_same_again_gives_the_same_answer_and_a_correction_counts(client: TestClient, store: LocalStore) -> None:
    one = new_id()
    answers = [client.post("/feedback", json={"request_id": one, "label": label}) for label in ("b", "b", "a", "b")]
    assert answers[0].json() == answers[1].json() == answers[3].json()
    assert [labels for _, labels, _, _ in read(store)] == [["b"], ["b"], ["a"], ["b"]]


def test_feedback_meets_its_answer_by_the_request_id(store: LocalStore, bundle_dir: Path, tmp_path: Path) -> None:
    slot = ModelSlot(ServedModel(Predictor.load(bundle_dir, threads=1)))
    log = PredictionLog("pets", store, tmp_path / "spool", Serve())
    log.start()
    with TestClient(make_app(slot, log=log, book=FeedbackBook("pets", store, Serve()))) as client:
        one = client.post("/predict", content=make_image(1)).json()
        files = [("file", (f"{seed}.png", make_image(seed), "image/png")) for seed in (2, 3)]
        several = client.post("/predict", files=files).json()
        ids = [result["request_id"] for result in several["results"]]
        assert ids == [f"{several['request_id']}.0", f"{several['request_id']}.1"]
        items = [
            {"request_id": name, "label": label} for name, label in zip([one["request_id"], *ids], "abc", strict=True)
        ]
        assert client.post("/feedback", json={"feedback": items}).status_code == 200
    log.stop()
    joined = join_feedback(read_predictions(store, "pets").table, read_feedback(store, "pets").table)
    assert joined["prediction"].to_pylist() == [one["prediction"], *(r["prediction"] for r in several["results"])]
    assert joined["feedback_labels"].to_pylist() == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label": "dog"}, (422, "unknown_label", "'dog' is no class; expected one of a, b, c")),
        ({"label": ""}, (400, "bad_feedback", "no text")),
        ({"label": "a\nb"}, (400, "bad_feedback", "no text")),
        ({"label": "a|b"}, (400, "bad_feedback", "has '|' in it")),
        ({"label": 7}, (400, "bad_feedback", "no text")),
        ({"label": None}, (400, "bad_feedback", "no text")),
        ({"label": "x" * 201, "allow_new": True}, (400, "bad_feedback", "no text")),
        ({"labels": ["a", "b"], "label": ...}, (400, "bad_feedback", "an item has 2 labels; expected one")),
        ({"labels": ["a"]}, (400, "bad_feedback", "both or neither")),
        ({"labels": "a", "label": ...}, (400, "bad_feedback", "no text")),
        ({"label": ...}, (400, "bad_feedback", "both or neither")),
        ({"request_id": "nonsense"}, (404, "unknown_request", "'nonsense' is no request id")),
        ({"request_id": 7}, (400, "bad_feedback", "no text as its `request_id`")),
        ({"request_id": ...}, (400, "bad_feedback", "no text as its `request_id`")),
        ({"request_id": "../../../etc/passwd"}, (404, "unknown_request", "no request id")),
        ({"request_id": new_id(-1)}, (404, "unknown_request", "no request id")),
        ({"request_id": new_id(91)}, (404, "too_old", "the last 90 days")),
        ({"allow_new": "yes"}, (400, "bad_feedback", "`allow_new` is 'yes'; expected true or false")),
        ({"who": {"a": 1}}, (400, "bad_feedback", "`who` is no text")),
        ({"weight": 1}, (400, "bad_feedback", "weight")),
    ],
)
def test_what_cannot_be_used_is_refused_and_not_stored(
    client: TestClient, store: LocalStore, changes: dict[str, Any], expected: tuple[int, str, str]
) -> None:
    status, code, words = expected
    item = {"request_id": new_id(), "label": "a", **changes}
    answer = client.post("/feedback", json={key: value for key, value in item.items() if value is not ...})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert words in answer.json()["detail"]
    assert read(store) == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"not json", 400),
        (b"[" * 100_000, 400),
        (b"\xff\xfe", 400),
        (b"[]", 400),
        (b"7", 400),
        (b"{}", 400),
        (b'{"feedback": []}', 400),
        (b'{"feedback": {}}', 400),
        (b'{"feedback": [{}], "label": "a"}', 400),
        (b" " * (MAX_BODY_BYTES + 1), 413),
        (json.dumps({"feedback": [{}] * 1001}).encode(), 413),
    ],
)
def test_a_hostile_body_gets_a_4xx(client: TestClient, store: LocalStore, body: bytes, status: int) -> None:
    assert client.post("/feedback", content=body).status_code == status
    assert read(store) == []


def test_in_a_list_one_that_is_wrong_spoils_no_other(client: TestClient, store: LocalStore) -> None:
    ids = [new_id(), new_id()]
    items = [
        {"request_id": ids[0], "label": "a"},
        7,
        {"request_id": ids[1], "label": "dog"},
        {"request_id": ids[1], "label": "b"},
    ]
    results = client.post("/feedback", json={"feedback": items}).json()["results"]
    assert [(one["request_id"], one.get("status"), one.get("error", {}).get("code")) for one in results] == [
        (ids[0], "taken", None),
        (None, None, "bad_feedback"),
        (ids[1], None, "unknown_label"),
        (ids[1], "taken", None),
    ]
    assert [labels for _, labels, _, _ in read(store)] == [["a"], ["b"]]
    assert len(list(store.list("feedback/"))) == 1


def test_of_a_list_the_last_word_on_an_answer_counts(client: TestClient, store: LocalStore) -> None:
    one = new_id()
    said = [("a", "b", "c")[number % 3] for number in range(20)]
    client.post("/feedback", json={"feedback": [{"request_id": one, "label": label} for label in said]})
    assert [labels for _, labels, _, _ in read(store)] == [[label] for label in said]


def test_a_new_label_is_taken_where_it_is_asked_for(client: TestClient, store: LocalStore) -> None:
    one = new_id()
    assert client.post("/feedback", json={"request_id": one, "label": "dog", "allow_new": True}).status_code == 200
    assert read(store) == [(one, ["dog"], True, None)]


def test_a_multilabel_answer_may_have_any_number_of_labels(store: LocalStore, tmp_path: Path) -> None:
    with make_client(store, tmp_path / "bundle", "multilabel") as client:
        for labels in ([], ["a", "c", "a"]):
            assert client.post("/feedback", json={"request_id": new_id(), "labels": labels}).status_code == 200
    assert [labels for _, labels, _, _ in read(store)] == [[], ["a", "c"]]


def test_while_the_store_is_away_nothing_is_promised(
    client: TestClient, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(key: str, data: bytes) -> bool:
        raise StoreError("store /secret/path", "cannot be reached")

    monkeypatch.setattr(store, "create", fail)
    answer = client.post("/feedback", json={"request_id": new_id(), "label": "a"})
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "store_away", "1")
    assert "secret" not in answer.text


def test_nothing_is_taken_into_a_store_that_is_not_the_known_one(store: LocalStore) -> None:
    known: list[bool] = []

    def check() -> None:
        if not known:
            raise StoreError("store", "does not hold dataset pets version 3")

    book, now = FeedbackBook("pets", store, Serve(), check=check), datetime.now(UTC)
    with pytest.raises(StoreError, match="does not hold"):
        book.write([{"request_id": new_id(), "labels": ["a"]}], now)
    assert not store.root.exists()
    known.append(True)
    book.write([{"request_id": new_id(), "labels": ["a"]}], now)
    assert len(read(store)) == 1


def test_nothing_is_taken_while_the_store_is_away(store: LocalStore, bundle_dir: Path, tmp_path: Path) -> None:
    store.put("ledger/pets/000001.json", b"{}")
    with make_client(store, bundle_dir) as client:
        store.root.rename(tmp_path / "moved")
        away = client.post("/feedback", json={"request_id": new_id(), "label": "a"})
        assert (away.status_code, away.json()["code"], store.root.exists()) == (503, "store_away", False)
        (tmp_path / "moved").rename(store.root)
        assert client.post("/feedback", json={"request_id": new_id(), "label": "a"}).status_code == 200
    assert len(read(store)) == 1


def test_the_store_is_checked_again_and_again(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_S", -1.0)
    store.put("ledger/pets/000001.json", b"{}")

    def check() -> None:
        if not store.exists("ledger/pets/000001.json"):
            raise StoreError("store", "does not hold ledger entry 1")

    book, now = FeedbackBook("pets", store, Serve(), check=check), datetime.now(UTC)
    book.write([{"request_id": new_id(), "labels": ["a"]}], now)
    store.delete("ledger/pets/000001.json")
    with pytest.raises(StoreError, match="does not hold"):
        book.write([{"request_id": new_id(), "labels": ["a"]}], now)


def test_a_server_without_a_log_takes_no_feedback(bundle_dir: Path) -> None:
    slot = ModelSlot(ServedModel(Predictor.load(bundle_dir, threads=1)))
    with TestClient(make_app(slot)) as client:
        answer = client.post("/feedback", json={"request_id": new_id(), "label": "a"})
    assert (answer.status_code, answer.json()["code"]) == (404, "no_log")


def test_more_than_the_share_of_a_client_is_told_to_wait(store: LocalStore, bundle_dir: Path) -> None:
    with make_client(store, bundle_dir, feedback_per_minute=2) as client:
        answers = [client.post("/feedback", json={"request_id": new_id(), "label": "a"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert (answers[2].json()["code"], 1 <= int(answers[2].headers["retry-after"]) <= 30) == ("too_many", True)
    assert len(read(store)) == 2


def test_a_body_counts_as_those_of_images_do(store: LocalStore, bundle_dir: Path) -> None:
    slot = ModelSlot(ServedModel(Predictor.load(bundle_dir, threads=1)))
    item = {"request_id": new_id(), "label": "a", "who": "x" * 200}
    with TestClient(make_app(slot, Limits(max_held_bytes=100), book=FeedbackBook("pets", store, Serve()))) as client:
        busy = client.post("/feedback", json=item)
        packed = client.post("/feedback", json=item, headers={"Content-Encoding": "gzip"})
    assert (busy.status_code, busy.json()["code"]) == (503, "busy")
    assert (packed.status_code, packed.json()["code"]) == (415, "encoding_not_supported")
    assert read(store) == []


def test_figures_say_what_became_of_answers_and_feedback(store: LocalStore, bundle_dir: Path, tmp_path: Path) -> None:
    slot = ModelSlot(ServedModel(Predictor.load(bundle_dir, threads=1)))
    log = PredictionLog("pets", store, tmp_path / "spool", Serve())
    log.start()
    book = FeedbackBook("pets", store, Serve())
    with TestClient(make_app(slot, log=log, book=book)) as client:
        for label, seed in (("a", 1), ("dog", 2)):
            one = client.post("/predict", content=make_image(seed)).json()
            client.post("/feedback", json={"request_id": one["request_id"], "label": label})
        log.stop()
        figures = client.get("/metrics").text.splitlines()
    for state, number in (("noted", 2), ("sent", 2), ("dropped", 0)):
        assert f'visionloop_log_answers_total{{state="{state}"}} {number}.0' in figures
    assert "visionloop_log_problem 0.0" in figures
    assert "visionloop_log_spool_bytes 0.0" in figures
    assert 'visionloop_feedback_items_total{outcome="taken"} 1.0' in figures
    assert 'visionloop_feedback_items_total{outcome="refused"} 1.0' in figures


def test_the_page_for_people_is_told_whether_the_server_keeps_pictures(bundle_dir: Path, tmp_path: Path) -> None:
    slot = ModelSlot(ServedModel(Predictor.load(bundle_dir, threads=1)))
    for told, serve in {"no": Serve(), "yes": Serve(keep_images=KeepImages(random=0.1))}.items():
        log = PredictionLog("fake", LocalStore(tmp_path / "store"), tmp_path / "spool", serve)
        page = TestClient(make_app(slot, log=log)).get("/").text
        assert page.count(f'data-keeps-images="{told}"') == page.count("data-keeps-images") == 1
