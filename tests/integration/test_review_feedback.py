"""Feedback of clients as labels: what is held, what never counts, and how much of it is read."""

import io
import json
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from PIL import Image

from fakes import make_image
from review_desk import SOURCES, ReviewDesk, make_review_desk
from visionloop.data.manifest import make_image_key
from visionloop.data.prediction_log import make_request_id
from visionloop.store.local import LocalStore


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ReviewDesk:
    return make_review_desk(tmp_path, monkeypatch, capsys)


def test_feedback_of_clients_is_held_and_bounded_and_never_reaches_test(desk: ReviewDesk) -> None:
    """A label of nobody that repeats the model is never one. Of one client and day the quota is accepted, and told."""
    desk.write(SOURCES + "review: {client_quota: 5}\n")
    rows = desk.serve(30)
    desk.say(rows[:4], "cat", who=None)  # what the model said itself
    desk.say(rows[4:6], "cat", who="eve")  # a person stands for it
    desk.say(rows[6:16], "dog", who=None)
    desk.say(rows[16:18], "dog", who="bob", client="yard")
    before = desk.by_sha256()
    desk.run("ingest")
    assert desk.by_sha256() == before

    told = desk.run("review", "--accept")
    assert "accepted: 7 labels" in told
    assert "held: 7 labels of client gate are over review.client_quota (5 a day)" in told
    assert "never a label: 4 that repeat the model's answer" in told
    desk.run("ingest")
    new = {sha256: row for sha256, row in desk.by_sha256().items() if sha256 not in before}
    assert {sha256: row.labels[0] for sha256, row in new.items()} == {
        row["image_sha256"]: label
        for some, label in ((rows[4:6], "cat"), (rows[6:9], "dog"), (rows[16:18], "dog"))
        for row in some
    }
    assert {row.side for row in new.values()} <= {"train", "val"}
    assert {row.origins[0].split("/")[0] for row in new.values()} == {"feedback:eve", "feedback:gate", "feedback:bob"}
    assert "accepted: 0 labels" in desk.run("review", "--accept")


def test_labels_are_listed_before_and_when_they_are_accepted_and_doubtful_ones_are_marked(desk: ReviewDesk) -> None:
    """A click of nobody goes into training: the image, the label and what the model was sure of are to be seen."""
    desk.write(SOURCES.replace("    - {kind: feedback}\n", "") + "review: {count: 3}\n")
    sure, unsure = desk.serve(2)  # cat, with 0.99 and 0.55
    desk.say([sure, unsure], "dog", who=None)
    mine = [one["image_sha256"][:12] for one in (sure, unsure)]
    rows = [
        f"  {mine[0]}  dog  by gate  model: cat 0.990  LOOK: the model was sure of another label",
        f"  {mine[1]}  dog  by gate  model: cat 0.550",
    ]
    told = desk.run("review").splitlines()
    assert told[told.index("2 labels wait: `visionloop review --accept`") + 1 :][:2] == rows
    told = desk.run("review", "--accept")
    assert told.splitlines()[1:3] == rows
    assert "next: add `- kind: feedback` under ingest.sources in params.yaml, then `visionloop ingest` takes" in told
    assert "LOOK: 2 accepted labels wait: add `- kind: feedback` under ingest.sources" in desk.run("ingest")
    declared = (desk.home / "params.yaml").read_text()
    desk.write(SOURCES + "review: {count: 3}\n")
    assert "accepted label" not in desk.run("ingest")
    (desk.home / "params.yaml").write_text(declared)
    assert "accepted label" not in desk.run("ingest"), "they are in the dataset, and stay there"
    desk.say(desk.serve(1, 8000), "dog", who="bob")
    [one] = json.loads(desk.run("review", "--accept", "--json"))["accepted"]
    assert (one["who"], one["before"], one["confidence"], one["is_doubtful"]) == (["bob"], ["cat"], 0.99, True)


def test_no_client_changes_test_and_what_is_like_a_test_image_does_not_come_into_train(desk: ReviewDesk) -> None:
    before = desk.by_sha256()
    one = next(row for row in before.values() if row.side == "test" and row.labels == ("cat",))
    data = desk.store.get(make_image_key(one.sha256))
    sink = io.BytesIO()
    Image.open(io.BytesIO(data)).save(sink, "WEBP", lossless=True)
    rows = desk.serve(3, images=[data, sink.getvalue(), make_image(7000)])
    desk.say(rows, "dog", who="eve")
    assert "accepted: 3 labels" in desk.run("review", "--accept")
    assert "source feedback: 1 labels of clients are of test images, which keep theirs" in desk.run("ingest")
    after = desk.by_sha256()
    assert after[one.sha256] == one
    assert [after[row["image_sha256"]].side for row in rows[:2]] == ["test", "excluded"]
    assert after[rows[2]["image_sha256"]].side in ("train", "val")


def test_test_image_that_was_taken_out_and_comes_again_stays_one_or_away(desk: ReviewDesk) -> None:
    """People who are asked bring it back to its side; no client brings it back at all, with a label of its own."""
    desk.write(SOURCES + "review: {count: 4, random: 0}\n")
    tests = [row for row in desk.by_sha256().values() if row.side == "test"]
    one, other = tests[0], next(row for row in tests if row.labels != tests[0].labels)
    data = [desk.store.get(make_image_key(row.sha256)) for row in (one, other)]
    for path in desk.photos.glob("*/*.png"):
        if path.read_bytes() in data:
            path.unlink()
    desk.run("ingest", "--prune")
    assert not {one.sha256, other.sha256} & {*desk.by_sha256()}
    desk.say(desk.serve(2, images=data)[:1], "dog", who="eve")
    assert "accepted: 1 label" in desk.run("review", "--accept")
    desk.run("review", "--csv", "ask.csv")
    desk.fill(desk.home / "ask.csv", {other.sha256: other.labels[0]})
    desk.run("review", "--take", "ask.csv", "--by", "ann")
    assert "accepted: 1 label (1 by ann)" in desk.run("review", "--accept")
    assert "source feedback: 1 labels of clients are of test images, which keep theirs" in desk.run("ingest")
    assert one.sha256 not in desk.by_sha256()
    assert desk.by_sha256()[other.sha256].side == "test"


def test_feedback_without_a_label_says_why(desk: ReviewDesk) -> None:
    """Each time the true reason: to accept what cannot be accepted is no advice."""
    desk.write(SOURCES.replace("    - {kind: review}\n", ""))
    assert "source feedback: no feedback has come in the last 90 days" in desk.run("ingest")
    row = desk.serve(3)[0]
    desk.say([{"request_id": make_request_id(datetime.now(UTC).timestamp())}], "dog", who="bob")
    desk.run("review", "--accept")
    said = "source feedback: the one feedback is not a label of an image that the server kept: `serve.keep_images`"
    assert said in desk.run("ingest")
    desk.say([row], "cat", who=None)
    assert "source feedback: what came repeats the model's answers, and no name stands" in desk.run("ingest")
    desk.say([row], "dog", who="bob")
    assert "source feedback: no label is accepted yet: `visionloop review --accept`" in desk.run("ingest")


def test_batch_reads_no_feedback_from_before_its_days(desk: ReviewDesk) -> None:
    desk.write(SOURCES + "review: {count: 4, random: 0.0}\n")
    rows = desk.serve(6)
    desk.say(rows[:1], "dog", who=None)
    desk.say(desk.serve(2, 8000, hours_ago=24 * 40), "dog", who=None, days_ago=40)
    told, read = list_days_read(desk, "review", "--json")
    assert rows[0]["image_sha256"] not in told
    assert read and max(read) < 39


def list_days_read(desk: ReviewDesk, *argv: str) -> tuple[str, set[int]]:
    """Return what a command says, and of how many days ago the parts are of the log and of feedback that it reads."""
    read, today = list[str](), datetime.now(UTC).date()
    get, open_ = LocalStore.get, LocalStore.open
    with desk.patch.context() as patch:
        patch.setattr(LocalStore, "get", lambda store, key: read.append(key) or get(store, key))
        patch.setattr(LocalStore, "open", lambda store, key: read.append(key) or open_(store, key))
        told = desk.run(*argv)
    parts = [key.split("/")[2] for key in read if key.startswith(("feedback/", "predictions/"))]
    return told, {(today - date.fromisoformat(part.removeprefix("date="))).days for part in parts}


def test_acceptance_reads_no_feedback_from_long_before_the_last_one(desk: ReviewDesk) -> None:
    """And none that is older than 90 days. Who gave a label that was accepted then still counts."""
    days = (100, 40, 3)
    old = {ago: desk.serve(2, 5000 + ago, hours_ago=24 * ago) for ago in days}
    for ago in days:
        desk.say(old[ago], "dog", who=None, client="yard", days_ago=ago)
    told, read = list_days_read(desk, "review", "--accept")
    assert "accepted: 4 labels" in told
    assert {40, 41} & read and not {99, 100, 101, 102} & read
    again = desk.serve(1, 9000, images=[desk.store.get(make_image_key(old[40][0]["image_sha256"]))])
    desk.say(again, "fox", who=None)
    for command in (("review", "--accept"), ("review",)):
        told, read = list_days_read(desk, *command)
        assert f"on {old[40][0]['image_sha256'][:12]} (nobody by yard: dog; nobody by gate: fox)" in told
        assert max(read) <= 4
    told, read = list_days_read(desk, "review", "--accept", "--from", "gate")
    assert ("accepted: 1 label" in told, max(read) <= 4) == (True, True)
