"""From served answers to the next version: the log, a batch, answers of people and of clients, what is accepted."""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fakes import make_image, run_here, write_photos
from pull_desk import PullDesk
from visionloop.data.acceptance import accept
from visionloop.data.answers import LOG, load_batches, load_opinions
from visionloop.data.manifest import latest_version, load_version_records, make_image_key
from visionloop.data.prediction_log import FEEDBACK, PREDICTIONS, make_kept_key, make_request_id
from visionloop.params import Review
from visionloop.records import ImageRecord
from visionloop.store.local import LocalStore

NAME = "pets"
SOURCES = """  sources:
    - {kind: folder, path: ../photos, name: photos}
    - {kind: review}
    - {kind: feedback}
"""
SIZE = 16


class ReviewDesk(PullDesk):
    """A workspace with a dataset of cats and dogs, and a log of kept images, whose truth is by their number."""

    def serve(
        self, number: int, first: int = 5000, hours_ago: float = 1.0, images: Sequence[bytes] = ()
    ) -> list[dict[str, Any]]:
        """Log answers: the model says cat to all, and is unsure of every other one; half is kept by lot."""
        rng, now = np.random.default_rng(first), datetime.now(UTC) - timedelta(hours=hours_ago)
        rows = []
        for place in range(number):
            data = images[place] if images else make_image(first + place)
            time = now + timedelta(seconds=place)
            sha256 = hashlib.sha256(data).hexdigest()
            self.store.put(make_kept_key(NAME, time.date(), sha256), data)
            rows.append(
                {
                    "request_id": make_request_id(time.timestamp()),
                    "time": time,
                    "client": "gate",
                    "image_sha256": sha256,
                    "model_name": NAME,
                    "model_digest": "d" * 64,
                    "task": "binary",
                    "classes": ["cat", "dog"],
                    "probs": [0.6, 0.4],
                    "prediction": "cat",
                    "confidence": 0.55 if place % 2 else 0.99,
                    "abstained": False,
                    "embedding": rng.normal(size=SIZE).tolist(),
                    "image_kept": True,
                    "keep_probability": 1.0 if place % 2 else 0.5,
                    "keep_reason": "confidence" if place % 2 else "random",
                }
            )
        part = f"part-{first}"
        self.store.put(PREDICTIONS.make_key(NAME, now.date(), part), PREDICTIONS.encode(rows))
        return rows

    def say(
        self, rows: list[dict[str, Any]], label: str, *, who: str | None, client: str = "gate", days_ago: int = 0
    ) -> None:
        """Send feedback on answers."""
        now = datetime.now(UTC) - timedelta(days=days_ago)
        given = [
            {
                "feedback_id": f"{place}",
                "request_id": row["request_id"],
                "time": now + timedelta(microseconds=place),
                "labels": [label],
                "is_new": False,
                "who": who,
                "client": client,
            }
            for place, row in enumerate(rows)
        ]
        key = FEEDBACK.make_key(NAME, now.date(), make_request_id(now.timestamp()))
        self.store.put(key, FEEDBACK.encode(given))

    def fill(self, path: Path, labels: dict[str, str]) -> None:
        """Write labels into a CSV, by sha256."""
        rows = [*csv.reader(path.open(newline=""))]
        for row in rows[1:]:
            row[5] = labels.get(row[0], "")
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    def by_sha256(self) -> dict[str, ImageRecord]:
        version = latest_version(self.store, NAME)
        assert version is not None
        return {row.sha256: row for row in load_version_records(self.store, version)}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> ReviewDesk:
    desk = ReviewDesk(tmp_path, monkeypatch, capsys)
    write_photos(desk.photos, 20)
    desk.write(SOURCES)
    desk.run("ingest")
    return desk


def test_answers_of_a_csv_make_the_next_version_with_the_right_sides(desk: ReviewDesk) -> None:
    """Only what was drawn by lot may come into test; its probability, and who said it, stand in its origin."""
    desk.write(SOURCES + "review: {count: 40, random: 0.5}\n")
    desk.serve(120)
    assert run_here(desk.patch, "review", "--csv", "ask.csv") == 0
    told, delay = desk.capsys.readouterr()
    assert delay.startswith("answers of the last 30 s may be missing")
    assert run_here(desk.patch, "review") == 0 and desk.capsys.readouterr().err == ""
    assert "batch 1 of" in told and "20 random" in told
    batch = load_batches(desk.store, NAME)[0]
    assert (batch.kind, len(batch.images), batch.classes) == (LOG, 40, ("cat", "dog"))
    asked = {one.sha256: one for one in batch.images}
    # 60 unsure images were kept for certain, 60 others with one half: all are drawn as 20 of 180 images of the traffic.
    assert {round(one.probability, 6) for one in batch.images if one.probability} == {round(20 / 180, 6)}
    assert len([*(desk.home / "ask").iterdir()]) == 40
    desk.fill(desk.home / "ask.csv", dict.fromkeys(asked, "dog"))
    assert "40 answers of ann are stored" in desk.run("review", "--take", "ask.csv", "--by", "ann")
    assert "0 answers of ann are stored, 40 were known" in desk.run("review", "--take", "ask.csv", "--by", "ann")
    before = desk.by_sha256()
    assert "no label is accepted yet" in desk.run("ingest")
    assert desk.by_sha256() == before

    assert "40 labels wait" in desk.run("review")
    assert "accepted: 40 labels (40 by ann)" in desk.run("review", "--accept")
    desk.run("ingest")
    new = {sha256: row for sha256, row in desk.by_sha256().items() if sha256 not in before}
    assert new.keys() == asked.keys() and {row.labels for row in new.values()} == {("dog",)}
    sides = {
        kind: {row.side for s, row in new.items() if (asked[s].reason == "random") == kind} for kind in (True, False)
    }
    assert sides[True] >= {"train", "test"} and sides[False] <= {"train", "val"}
    for sha256, row in new.items():
        one = asked[sha256]
        reason = f"random@{one.probability:.4g}" if one.reason == "random" else one.reason
        assert row.origins == (f"review:ann/{reason}/{sha256[:16]}",)
        assert row.sources == ("review",)
    assert "nothing" in desk.run("ingest")


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


def test_feedback_without_a_label_says_why(desk: ReviewDesk) -> None:
    """Each time the true reason: to accept what cannot be accepted is no advice."""
    desk.write(SOURCES.replace("    - {kind: review}\n", ""))
    assert "source feedback: no feedback has come yet" in desk.run("ingest")
    row = desk.serve(3)[0]
    desk.say([{"request_id": make_request_id(datetime.now(UTC).timestamp())}], "dog", who="bob")
    desk.run("review", "--accept")
    said = "source feedback: the one feedback is not a label of an image that the server kept: `serve.keep_images`"
    assert said in desk.run("ingest")
    desk.say([row], "cat", who=None)
    assert "source feedback: what came repeats the model's answers, and no name stands" in desk.run("ingest")
    desk.say([row], "dog", who="bob")
    assert "source feedback: no label is accepted yet: `visionloop review --accept`" in desk.run("ingest")


def test_people_who_disagree_hold_an_image_until_one_is_believed(desk: ReviewDesk) -> None:
    desk.write(SOURCES + "review: {count: 3, accept_at_once: [cleo]}\n")
    desk.serve(10)
    desk.run("review", "--csv", "a.csv")
    first, second, third = (one.sha256 for one in load_batches(desk.store, NAME)[0].images)
    desk.fill(desk.home / "a.csv", {first: "cat", second: "dog"})
    desk.run("review", "--take", "a.csv", "--by", "ann")
    desk.fill(desk.home / "a.csv", {first: "dog", second: "dog"})
    desk.run("review", "--take", "a.csv", "--by", "bob")
    desk.fill(desk.home / "a.csv", {third: "dog"})
    assert "need no word" in desk.run("review", "--take", "a.csv", "--by", "cleo")
    desk.run("review", "--take", "a.csv", "--by", "bob")  # who agrees takes nothing from cleo's word

    told = desk.run("review", "--accept")
    assert f"held: people disagree on {first[:12]} (ann: cat; bob: dog)" in told
    assert "accepted: 1 label (1 by ann, 1 by bob)" in told
    desk.run("ingest")
    rows = desk.by_sha256()
    assert (first in rows, rows[second].labels, rows[third].labels) == (False, ("dog",), ("dog",))
    assert "+".join(("ann", "bob")) in rows[second].origins[0]
    desk.run("review", "--accept", "--from", "ann")
    assert "disagree" not in desk.run("review", "--accept")
    desk.run("ingest")
    assert desk.by_sha256()[first].labels == ("cat",)


def test_name_that_answered_nothing_and_a_sheet_without_a_label_are_refused(desk: ReviewDesk) -> None:
    desk.write(SOURCES + "review: {count: 3}\n")
    rows = desk.serve(10)
    desk.run("review", "--csv", "a.csv")
    assert "--from bob: has answered nothing; expected one who has" in desk.run(
        "review", "--accept", "--from", "bob", code=2
    )
    said = desk.run("review", "--take", "a.csv", "--by", "bob", code=2)
    assert "--take a.csv: has no answer in 3 rows; expected one in the column `label`. Fill it in" in said
    desk.fill(desk.home / "a.csv", {load_batches(desk.store, NAME)[0].images[0].sha256: "dog"})
    taken = desk.run("review", "--take", "a.csv", "--by", "bob")
    assert taken.startswith("1 answer of bob is stored; 2 rows have none\n")
    assert "1 label waits:" in desk.run("review")
    desk.say(rows[:1], "dog", who=None)
    said = desk.run("review", "--accept", "--from", "nobody", code=2)
    assert "--from nobody: has answered nothing; expected bob, gate, whose labels wait. Mend the name." in said
    desk.run("review", "--accept", "--from", "bob")
    desk.run("review", "--accept", "--from", "bob")  # nothing waits any more: no mistake


def test_person_who_corrects_an_answer_relabels_the_image_for_good(desk: ReviewDesk) -> None:
    """The corrected label also beats what the folder says of the same bytes; a side never changes."""
    desk.write(SOURCES + "review: {count: 4}\n")
    desk.serve(8)
    desk.run("review", "--csv", "a.csv")
    one = load_batches(desk.store, NAME)[0].images[0].sha256
    for label in ("cat", "dog"):
        desk.fill(desk.home / "a.csv", {one: label})
        desk.run("review", "--take", "a.csv", "--by", "ann")
        desk.run("review", "--accept")
        desk.run("ingest")
        assert desk.by_sha256()[one].labels == (label,)
    (desk.photos / "cat" / "same.png").write_bytes(desk.store.get(f"images/{one[:2]}/{one}"))
    side = desk.by_sha256()[one].side
    desk.run("ingest")
    row = desk.by_sha256()[one]
    assert (row.labels, row.side, row.sources) == (("dog",), side, ("photos", "review"))
    desk.pull()  # the folder by itself, before and after
    desk.fill(desk.home / "a.csv", {one: "cat"})
    desk.run("review", "--take", "a.csv", "--by", "ann")
    desk.run("review", "--accept")
    desk.pull()
    assert desk.by_sha256()[one].labels == ("cat",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "catt"}, "row 2: has the label 'catt'; expected one of cat, dog. Mend it, or say --allow-new"),
        ({"sha256": "zz"}, "row 2: has the sha256 'zz'; expected an image that was asked about."),
        ({"remark": "hm"}, "row 2: has the remark 'hm'; expected `not ours`, `skip`, or nothing. Mend it."),
        ({"label": "cat", "remark": "skip"}, "row 2: has the remark 'skip' and the label 'cat'; expected"),
        ({"label": "x" * 300}, "row 2: has the label 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'; expected text of up"),
        ({"label": "a|b"}, "row 2: has a label with '|' in it; expected names without it"),
    ],
)
def test_csv_with_a_mistake_is_refused_whole(desk: ReviewDesk, change: dict[str, str], said: str) -> None:
    desk.write(SOURCES + "review: {count: 3}\n")
    desk.serve(6)
    desk.run("review", "--csv", "a.csv")
    path = desk.home / "a.csv"
    header, *rows = csv.reader(path.open(newline=""))
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    cells[1]["label"] = "dog"
    cells[0] |= change
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as a spreadsheet of Europe saves it
        writer = csv.writer(file, delimiter=";")
        writer.writerows([header, *([cell[name] for name in header] for cell in cells)])
    assert said in desk.run("review", "--take", "a.csv", "--by", "ann", code=2)
    assert load_opinions(desk.store, NAME) == []


def test_files_that_are_no_such_csv_say_what_is_wrong(desk: ReviewDesk) -> None:
    for name, data, said in (
        ("gone.csv", None, "cannot be read (No such file or directory)"),
        ("empty.csv", b"", "row 1: has no column sha256 among none"),
        ("other.csv", b"a,b\n1,2\n", "row 1: has no column sha256 among a, b"),
        ("bytes.csv", b"\xff\xfe\x00sha256", "is not UTF-8 text"),
        ("quote.csv", b'sha256,label\n"a', "is no CSV"),
    ):
        if data is not None:
            (desk.home / name).write_bytes(data)
        assert said in desk.run("review", "--take", name, "--by", "ann", code=2), name
    assert "has no --by" in desk.run("review", "--take", "a.csv", code=2)
    assert "got --csv and --accept" in desk.run("review", "--csv", "a.csv", "--accept", code=2)
    said = desk.run("review", code=2)
    assert "the server has kept no image in 14 days" in said
    assert "A server sends what it keeps every 30 s (serve.log_flush_s)." in said


def test_next_batch_asks_nothing_again_and_draws_only_among_new_traffic(desk: ReviewDesk) -> None:
    desk.write(SOURCES + "review: {count: 10, random: 0.5}\n")
    desk.serve(40)
    first = json.loads(desk.run("review", "--json"))
    assert json.loads(desk.run("review", "--json"))["number"] == first["number"] == 1
    second = json.loads(desk.run("review", "--new", "--json"))
    shas = [{one["sha256"] for one in batch["images"]} for batch in (first, second)]
    assert second["number"] == 2 and len(shas[1]) == 10 and not shas[0] & shas[1]
    reasons = [[one["reason"] for one in batch["images"]].count("random") for batch in (first, second)]
    assert reasons == [5, 0]  # nothing has come since


def test_batch_reads_no_feedback_from_before_its_days(desk: ReviewDesk) -> None:
    desk.write(SOURCES + "review: {count: 4, random: 0.0}\n")
    rows = desk.serve(6)
    desk.say(rows[:1], "dog", who=None)
    desk.say(desk.serve(2, 8000, hours_ago=24 * 40), "dog", who=None, days_ago=40)
    read, open_it = list[str](), LocalStore.open
    desk.patch.setattr(LocalStore, "open", lambda store, key: read.append(key) or open_it(store, key))
    assert rows[0]["image_sha256"] not in desk.run("review", "--json")
    days = {key.split("/")[2] for key in read if key.startswith(("feedback/", "predictions/"))}
    assert days and f"date={datetime.now(UTC) - timedelta(days=40):%Y-%m-%d}" not in days


def test_only_unsure_answers_are_said_to_be_uncertain(desk: ReviewDesk) -> None:
    """Of 20 images 10 are sure (99 %) and 10 unsure (55 %); where 0.5 is the limit of the server, none is unsure."""
    rules = "review: {count: 20, random: 0}\n"
    desk.write(SOURCES + rules)
    desk.serve(20)
    reasons = {(one["confidence"], one["reason"]) for one in json.loads(desk.run("review", "--json"))["images"]}
    assert reasons == {(0.55, "uncertain"), (0.99, "spread")}
    desk.write(SOURCES + rules + "serve: {keep_images: {confidence: 0.5}}\n")
    desk.serve(20, first=6000)
    assert {one["reason"] for one in json.loads(desk.run("review", "--new", "--json"))["images"]} == {"spread"}


def test_batch_lists_the_images_that_are_open(desk: ReviewDesk) -> None:
    desk.write(SOURCES + "review: {count: 15}\n")
    desk.serve(20)
    desk.run("review", "--csv", "a.csv")
    *others, last = (one.sha256 for one in load_batches(desk.store, NAME)[0].images)
    desk.fill(desk.home / "a.csv", dict.fromkeys(others, "dog"))
    desk.run("review", "--take", "a.csv", "--by", "ann")
    told = desk.run("review").splitlines()
    assert told[0].endswith("14 answered") and told[1] == "still open:"
    assert last[:12] in told[2] and told[3] == "14 labels wait: `visionloop review --accept`"


def test_damaged_batch_is_named(desk: ReviewDesk) -> None:
    desk.serve(6)
    desk.run("review")
    desk.store.put("review/pets/batches/000001.json", b"{}")
    assert "store object review/pets/batches/000001.json: is damaged" in desk.run("review", code=2)


def test_forgotten_image_is_in_no_batch_answer_or_acceptance(desk: ReviewDesk) -> None:
    desk.write(SOURCES + "review: {count: 4}\n")
    desk.serve(6)
    desk.run("review", "--csv", "a.csv")
    one, other = (image.sha256 for image in load_batches(desk.store, NAME)[0].images[:2])
    desk.fill(desk.home / "a.csv", {one: "cat", other: "dog"})
    desk.run("review", "--take", "a.csv", "--by", "ann")
    desk.run("review", "--accept")
    assert run_here(desk.patch, "forget", one, "--why", "asked", "--yes") == 0
    left = [key for key in desk.store.list("") if one in key or one.encode() in desk.store.get(key)]
    assert all(key.startswith("tombstones/") for key in left), left
    desk.run("ingest")
    assert one not in desk.by_sha256() and other in desk.by_sha256()
    assert len(load_opinions(desk.store, NAME)) == 1
    accepted = accept(desk.store, NAME, Review(), by="ann", now=datetime.now(UTC))
    assert (accepted.labels, accepted.conflicts) == ((), {})
