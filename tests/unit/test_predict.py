"""Batch prediction: what is found, what cannot be used, what is written."""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fakes import make_bundle, make_image
from videos import RED, WHITE, Film, write_sound, write_video
from visionloop.cli.pictures import draw_sheet
from visionloop.data.encoded import name_readable
from visionloop.errors import DiskError, SourceError
from visionloop.predict.chunks import predict_in_chunks
from visionloop.predict.files import FilePrediction, Sampling, find_images, predict_files
from visionloop.predict.tables import Table
from visionloop.predictor import Predictor


def names(files: list[Path]) -> list[str]:
    return [f.name for f in files]


def test_files_folders_and_globs(photos: Path) -> None:
    assert names(find_images([str(photos)])) == ["a.png", "broken.jpg", "b.JPG"]
    assert names(find_images([str(photos / "**" / "*.JPG"), str(photos / "a.png"), str(photos / "*.png")])) == [
        "b.JPG",
        "a.png",
    ]


def test_a_glob_goes_through_folders_as_ingest_does(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "else" / "deep").mkdir(parents=True)
    (tmp_path / "else" / "deep" / "c.png").write_bytes(make_image(3))
    (photos / "linked").symlink_to(tmp_path / "else")
    for link in ("up", "again"):  # by two such links a file has 2 ** 40 paths
        (photos / "sub" / link).symlink_to(photos)
    for hidden in ("@eaDir", ".cache", "sub/@eaDir"):
        (photos / hidden).mkdir()
        (photos / hidden / "d.png").write_bytes(make_image(4))
    assert find_images([str(photos / "**" / "*.png")]) == [photos / "a.png", photos / "linked" / "deep" / "c.png"]
    assert names(find_images([f"{photos}/**/deep/**"])) == ["c.png"]
    assert names(find_images([f"{photos}/s?b/**/*"])) == ["b.JPG"]
    with pytest.raises(SourceError, match=r"d\.png: matches nothing; expected an image, a folder or a glob"):
        find_images([f"{photos}/*/d.png"])
    assert names(find_images([f"{photos}/@eaDir/*.png", f"{photos}/.c*/*.png"])) == ["d.png", "d.png"]
    monkeypatch.chdir(photos)
    assert find_images(["**/*.png", "*/b.*"]) == [Path("a.png"), Path("linked/deep/c.png"), Path("sub/b.JPG")]


def plan(out: Path, form: str | None = None) -> Table:
    table = Table.plan(out, form)
    assert table is not None
    return table


def test_the_form_of_a_table_goes_by_its_name() -> None:
    assert [plan(Path(f"a{end}")).form for end in (".CSV", ".jsonl", ".parquet")] == ["csv", "jsonl", "parquet"]
    assert plan(Path("a.csv"), "kaggle").form == "kaggle"
    assert Table.plan(None, None) is None
    with pytest.raises(SourceError, match=r"--format: needs a file to write; expected --out FILE\.csv"):
        Table.plan(None, "kaggle")
    for name, form, message in (
        ("x.txt", None, r"got 'x\.txt'; expected a file that ends in \.jsonl, \.csv, \.parquet"),
        ("x.csv", "coco", "got 'coco'; expected kaggle"),
        ("x.jsonl", "kaggle", r"got 'x\.jsonl'; expected a \.csv file"),
    ):
        with pytest.raises(SourceError, match=message):
            Table.plan(Path(name), form)
    with pytest.raises(DiskError, match=r"--out nowhere/deep/x\.csv: there is no folder nowhere/deep; expected one"):
        Table.plan(Path("nowhere/deep/x.csv"), None)


@pytest.mark.parametrize("classes", [("a", "b", "c"), ("a", "b")])
def test_answers_equal_the_predictor_and_a_broken_file_has_its_reason(
    photos: Path, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    make_bundle(tmp_path / "bundle", classes=classes)
    predictor = Predictor.load(tmp_path / "bundle")
    good, broken, jpg = predict_files(predictor, find_images([str(photos)]))
    assert good.prediction == predictor.predict([make_image(1)])[0]
    assert jpg.prediction == predictor.predict([make_image(2, kind="JPEG")])[0]
    assert (broken.prediction, broken.error) == (None, f"is text, not an image; expected {name_readable()}")


def test_written_answers(photos: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    answers = list(predict_files(predictor, find_images([str(photos)])))
    plan(tmp_path / "out.jsonl").write(answers, predictor)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r.get("prediction") for r in rows] == [a.prediction and a.prediction.prediction for a in answers]
    assert rows[0]["bundle"] == predictor.digest
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    plan(tmp_path / "out.csv").write(answers, predictor)
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["path", "prediction", "confidence", "abstained", "error", "bundle", "p_a", "p_b", "p_c"]
    assert float(table[0]["p_a"]) == pytest.approx(rows[0]["probabilities"]["a"], abs=1e-6)
    assert table[1]["error"].startswith("is text, not an image")


def test_written_answers_of_several_labels(photos: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", task="multilabel", seed=1)
    predictor = Predictor.load(tmp_path / "bundle")
    for seed in range(20):
        (photos / f"{seed}.png").write_bytes(make_image(seed))
    answers = list(predict_files(predictor, find_images([str(photos)])))
    plan(tmp_path / "out.jsonl").write(answers, predictor)
    plan(tmp_path / "out.csv").write(answers, predictor)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 23
    for line, row, answer in zip(lines, rows, answers, strict=True):
        if answer.prediction is None:
            assert "labels" not in line
            assert (row["prediction"], row["confidence"], row["p_a"]) == ("", "", "")
            assert row["error"] == line["error"] != ""
            continue
        assert line["labels"] == list(answer.prediction.labels or ())
        assert line["labels"] == [c for c in "abc" if line["probabilities"][c] >= 0.5]
        assert row["prediction"] == line["prediction"] == "|".join(line["labels"])
        assert row["error"] == ""
    assert {len(line.get("labels", [])) for line in lines} >= {0, 1, 2}


def test_a_folder_is_read_as_ingest_reads_it(photos: Path, tmp_path: Path) -> None:
    hidden = photos / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "a-checkpoint.png").write_bytes(make_image(3))
    (photos / "._a.png").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.png").write_bytes(make_image(4))
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "again").symlink_to(photos)
    assert names(find_images([str(photos)])) == ["a.png", "broken.jpg", "c.png", "b.JPG"]


def test_answers_that_cannot_be_written_leave_no_half_file(photos: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    answers = list(predict_files(predictor, find_images([str(photos)])))
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(DiskError, match=r"--out .*out\.csv: cannot be written \(Is a directory\)"):
        Table(tmp_path / "out.csv", "csv").write(answers, predictor)
    with pytest.raises(AttributeError):
        plan(tmp_path / "out.jsonl").write([*answers, None], predictor)  # type: ignore[list-item]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "out.csv", "photos"]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_competition_gets_a_row_for_every_id(photos: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    answers = list(predict_files(predictor, find_images([str(photos)])))
    plan(tmp_path / "out.csv", "kaggle").write(answers, predictor)
    rows = read_csv(tmp_path / "out.csv")
    assert [list(row) for row in rows] == [["id", "a", "b", "c"]] * 3
    assert [row["id"] for row in rows] == ["a", "broken", "b"]
    assert answers[0].prediction is not None
    assert float(rows[0]["c"]) == pytest.approx(answers[0].prediction.probabilities["c"], rel=1e-6)
    assert [float(rows[1][c]) for c in "abc"] == pytest.approx([1 / 3] * 3, rel=1e-6)


def test_what_stands_in_rows_of_unusable_files_is_told() -> None:
    assert plan(Path("a.csv"), "kaggle").describe(9, 3) == "9 rows, 3 of them with the same probability for every class"
    assert plan(Path("a.csv")).describe(9, 1) == "9 rows, 1 of them with the reason"
    assert plan(Path("a.csv")).describe(1, 0) == "1 row"


def test_two_files_with_one_id_are_named(photos: Path, tmp_path: Path) -> None:
    (photos / "sub" / "a.jpg").write_bytes(make_image(5, kind="JPEG"))
    make_bundle(tmp_path / "bundle")
    predictor, table = Predictor.load(tmp_path / "bundle"), plan(tmp_path / "o.csv", "kaggle")
    with (
        pytest.raises(SourceError, match=r"photos/a\.png and .*photos/sub/a\.jpg have the same id 'a'"),
        predict_in_chunks(predictor, find_images([str(photos)]), table, tmp_path / "work"),
    ):
        pass


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_parquet_table_equals_the_json_lines(photos: Path, tmp_path: Path, task: str) -> None:
    make_bundle(tmp_path / "bundle", task=task, seed=1)
    predictor = Predictor.load(tmp_path / "bundle")
    answers = list(predict_files(predictor, find_images([str(photos)])))
    for end in ("parquet", "jsonl"):
        plan(tmp_path / f"out.{end}").write(answers, predictor)
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    for row, line in zip(rows, (tmp_path / "out.jsonl").read_text().splitlines(), strict=True):
        value = json.loads(line)
        for key in ("path", "error", "bundle", "prediction", "confidence"):
            assert row[key] == value.get(key)
        assert row.get("labels") == value.get("labels")
        for name in "abc":
            wanted = value["probabilities"][name] if "probabilities" in value else None
            assert row[f"p_{name}"] == (wanted if wanted is None else pytest.approx(wanted, rel=1e-6))


def test_a_stopped_run_goes_on_where_it_was(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        (photos / f"{seed:02d}.png").write_bytes(make_image(seed))
    make_bundle(tmp_path / "bundle")
    predictor, files = Predictor.load(tmp_path / "bundle"), find_images([str(photos)])
    table, work = plan(tmp_path / "out.csv"), tmp_path / "work"
    monkeypatch.setattr("visionloop.predict.chunks.CHUNK_IMAGES", 5)
    monkeypatch.setattr("visionloop.predict.files.REPORT_EVERY", 1)
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), predict_in_chunks(predictor, files, table, work, on_progress=stop):
        pass
    assert seen == list(range(1, 14))
    lines: list[str] = []
    seen.clear()
    with predict_in_chunks(
        predictor, files, table, work, on_progress=lambda done, total: seen.append(done), tell=lines.append
    ) as chunks:
        table.write(chunks.read(), predictor)
    assert (lines, seen) == (["10 of 23 were answered by a run that stopped"], list(range(11, 24)))
    assert list(work.iterdir()) == []
    whole = tmp_path / "whole.csv"
    plan(whole).write(predict_files(predictor, files), predictor)
    assert read_csv(whole) == read_csv(table.out)


def test_a_stopped_run_over_videos_has_kept_all_but_the_last_few(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    for number in range(9):
        (tmp_path / f"{number}.mp4").write_bytes(b"")
    predictor, files, lines = Predictor.load(tmp_path / "bundle"), sorted(tmp_path.glob("*.mp4")), list[str]()
    table, work = plan(tmp_path / "out.csv"), tmp_path / "work"

    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), predict_in_chunks(predictor, files, table, work, on_progress=stop):
        pass
    with predict_in_chunks(predictor, files, table, work, tell=lines.append) as chunks:
        assert [Path(one.path).name for one in chunks.read()] == [f"{number}.mp4" for number in range(9)]
    assert lines == ["8 of 9 were answered by a run that stopped"]


def test_other_files_or_another_model_begin_anew(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.predict.chunks.CHUNK_IMAGES", 1)
    make_bundle(tmp_path / "one")
    make_bundle(tmp_path / "two", seed=5)
    table, work, lines = plan(tmp_path / "out.csv"), tmp_path / "work", list[str]()

    def answer(bundle: str) -> list[FilePrediction]:
        predictor = Predictor.load(tmp_path / bundle)
        answers: list[FilePrediction] = []
        files = find_images([str(photos)])
        with (
            pytest.raises(ZeroDivisionError),
            predict_in_chunks(predictor, files, table, work, tell=lines.append) as chunks,
        ):
            answers += chunks.read()
            raise ZeroDivisionError
        return answers

    first = answer("one")
    assert (answer("one"), len(lines)) == (first, 1)
    assert answer("two") != first
    (photos / "a.png").write_bytes(make_image(9))
    os.utime(photos / "a.png", (1, 1))
    assert answer("two")[0] != first[0]
    assert lines == ["3 of 3 were answered by a run that stopped"]


@pytest.mark.parametrize(("number", "most", "shown"), [(6, 24, 6), (1, 24, 1), (5, 3, 3)])
def test_a_sheet_shows_all_of_few_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, most: int, shown: int
) -> None:
    make_bundle(tmp_path / "bundle")
    files = [tmp_path / f"{place}.png" for place in range(number)]
    for place, file in enumerate(files):
        file.write_bytes(make_image(place))
    drawn: list[str] = []
    monkeypatch.setattr(
        "visionloop.data.contact_sheet.draw_prediction_sheet",
        lambda panels, title, notes: drawn.extend([*(panel.note for panel in panels), title]) or b"",
    )
    draw_sheet(Predictor.load(tmp_path / "bundle"), [*files, tmp_path / "film.mp4"], most=most)
    assert len(set(drawn[:-1])) == len(drawn) - 1 == shown, "none twice"
    assert (drawn[0], drawn[-2]) == ("0.png", f"{number - 1}.png"), "from the first to the last"
    assert drawn[-1].startswith(f"{shown} of {number} images, bundle ")


def test_a_sheet_shows_the_truth_where_the_folder_names_a_class(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    answer = predictor.predict([make_image(1)])[0].prediction
    wrong = next(name for name in "abc" if name != answer)
    for folder in (answer, wrong, "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(make_image(1))
    (tmp_path / "elsewhere" / "broken.png").write_bytes(b"x")

    def count_ink(folder: str) -> tuple[int, int]:
        sheet = Image.open(io.BytesIO(draw_sheet(predictor, find_images([str(tmp_path / folder)]))))
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
        return tuple(int((pixels == ink).all(axis=1).sum()) for ink in ((0x1C, 0x7A, 0x43), (0xC0, 0x2B, 0x2B)))  # type: ignore[return-value]

    right, missed, unknown = count_ink(answer), count_ink(wrong), count_ink("elsewhere")
    assert right[0] > 20 and right[1] == 0
    assert missed[1] > 20 and missed[0] == 0
    assert unknown == (0, 0)


def test_a_video_is_one_row_with_its_segments_beside_the_images(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    predictor, folder = Predictor.load(tmp_path / "bundle"), tmp_path / "mixed"
    write_video(folder / "a.mp4", Film([RED, WHITE, WHITE], 2.0))
    (folder / "b.png").write_bytes(make_image(1))
    data = (folder / "a.mp4").read_bytes()
    (folder / "c.mp4").write_bytes(data[: len(data) // 2])
    (folder / "d.mp4").write_bytes(b"")
    (folder / "e.ts").write_text("export const nothing = 1;")
    write_sound(folder / "f.mp4")
    files = find_images([str(folder)])
    assert names(files) == ["a.mp4", "b.png", "c.mp4", "d.mp4", "e.ts", "f.mp4"]
    table, seen = plan(tmp_path / "answers.jsonl"), []
    with predict_in_chunks(predictor, files, table, tmp_path / "work", on_progress=lambda *d: seen.append(d)) as chunks:
        table.write(chunks.read(), predictor)
    rows = [json.loads(line) for line in table.out.read_text().splitlines()]
    video, image, cut, empty, text, sound = rows
    assert [(one["start_s"], one["end_s"], one["prediction"]) for one in video["segments"]] == [
        (0.0, 2.0, "a"),
        (2.0, 6.0, "c"),
    ]
    assert (video["prediction"], video["error"], video["notes"]) == ("c", None, [])
    assert (video["every_s"], video["smooth_s"], video["num_frames"], video["duration_s"]) == (0.5, 1.0, 12, 6.0)
    assert video["shares"] == {"c": pytest.approx(2 / 3), "a": pytest.approx(1 / 3)}
    ends = [Predictor.predict(predictor, [np.full((8, 8, 3), color, np.uint8)])[0] for color in (RED, WHITE)]
    mean = (ends[0].probabilities["c"] + 2 * ends[1].probabilities["c"]) / 3
    assert video["probabilities"]["c"] == pytest.approx(mean, abs=0.01)
    assert image["prediction"] == predictor.predict([make_image(1)])[0].prediction and "segments" not in image
    assert [one.get("prediction") for one in (cut, empty, text, sound)] == [None] * 4
    assert "no whole index" in cut["error"]
    assert "is not a video we read" in empty["error"] and "is not a video we read" in text["error"]
    assert "holds no video" in sound["error"]
    assert seen[-1] == (6, 6)
    longer = next(predict_files(predictor, files[:1], sampling=Sampling(0.7, 0.0))).video
    assert longer and (longer["duration_s"], longer["segments"][-1]["end_s"]) == (6.0, 6.0), "not 5.6 + 0.7"
    quick = next(predict_files(predictor, files[:1], sampling=Sampling(0.1, 0.0)))
    assert quick.video and (quick.video["num_frames"], quick.video["smooth_s"]) == (60, 0.0)
