"""What a message advises is typed, as it stands, and leads on: in workspaces without sources, after one-time pulls."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import make_image, write_photos
from pull_desk import PullDesk, find_files, move
from visionloop.cli.monitoring import name_next
from visionloop.params import Params


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PullDesk:
    desk = PullDesk(tmp_path, monkeypatch, capsys)
    write_photos(desk.photos)
    return desk


def have_no_version(desk: PullDesk) -> str:
    return desk.run("datasets")


def drop_from_nothing(desk: PullDesk) -> str:
    return desk.run("datasets", "drop", "1", code=2)


def drop_a_version_that_is_not_there(desk: PullDesk) -> str:
    desk.pull()
    return desk.run("datasets", "show", "9", code=2)


def ingest_nothing(desk: PullDesk) -> str:
    return desk.run("ingest", code=2)


def verify_nothing(desk: PullDesk) -> str:
    desk.pull()
    return desk.run("ingest", "--verify", code=2)


def lose_the_pin(desk: PullDesk) -> str:
    desk.pull()
    (desk.home / "data" / "dataset.json").unlink()
    return desk.run("prepare", code=2)


def break_the_pin(desk: PullDesk) -> str:
    desk.pull()
    (desk.home / "data" / "dataset.json").write_text("<<<<<<< HEAD")
    return desk.run("prepare", code=2)


def pin_an_older_one(desk: PullDesk) -> str:
    desk.pull()
    pin = (desk.home / "data" / "dataset.json").read_text()
    desk.run("ingest", write_photos(desk.home.parent / "more", first=100))
    (desk.home / "data" / "dataset.json").write_text(pin)
    return desk.pull()


def drop_an_older_one(desk: PullDesk) -> str:
    desk.pull()
    desk.run("ingest", write_photos(desk.home.parent / "more", first=100), "--name", "more")
    return desk.run("datasets", "drop", "1", code=2)


def bring_a_folder_of_new_classes(desk: PullDesk) -> str:
    desk.pull()
    write_photos(desk.photos, first=100, classes=("fox", "hare"))
    return desk.pull(code=2)


def sort_anew(desk: PullDesk) -> str:
    desk.pull()
    move(find_files(desk.photos / "cat", 9), desk.photos / "dog")
    return desk.pull(code=2)


def sort_anew_in_a_declared_source(desk: PullDesk) -> str:
    desk.write(f"  sources: [{{kind: folder, path: {desk.photos}, name: photos}}]\n")
    desk.run("ingest")
    move(find_files(desk.photos / "cat", 9), desk.photos / "dog")
    return desk.run("ingest", code=2)


def delete_in_a_declared_source(desk: PullDesk) -> str:
    desk.write(f"  sources: [{{kind: folder, path: {desk.photos}, name: photos}}]\n")
    desk.run("ingest")
    (desk.photos / "cat" / "0.png").unlink()
    return desk.run("ingest")


def have_too_many_of_a_class(desk: PullDesk) -> str:
    desk.write("  expect: {max_imbalance: 1.5}\n")
    desk.pull()
    desk.write()
    write_photos(desk.photos, 10, 100, classes=("cat",))
    desk.pull()
    for number in range(100, 110):
        (desk.photos / "cat" / f"{number}.png").unlink()
    desk.write("  expect: {max_imbalance: 1.5}\n")
    return desk.pull(code=2)


def prune(desk: PullDesk) -> str:
    desk.pull()
    (desk.photos / "cat" / "0.png").unlink()
    return desk.pull("--prune")


def hold_two_ways_to_read_it(desk: PullDesk) -> str:
    rows = "".join(f"{c}/{p.name},{p.stem}\n" for c in ("cat", "dog") for p in (desk.photos / c).iterdir())
    (desk.photos / "labels.csv").write_text("file,weather\n" + rows)
    return desk.run("ingest", desk.photos, code=2)


def lose_an_image(desk: PullDesk) -> str:
    desk.pull()
    sha256 = next(iter(desk.rows().values())).sha256
    desk.store.delete(f"images/{sha256[:2]}/{sha256}")
    return desk.run("prepare", code=2)


# What is done, a pattern of the advice in what is told, and the options alone where the command is the one before.
ADVICE: list[tuple[Callable[[PullDesk], str], str]] = [
    (have_no_version, r"`visionloop (ingest PATH)` makes one"),
    (drop_from_nothing, r"Run `visionloop (ingest PATH)`"),
    (drop_a_version_that_is_not_there, r"`visionloop (datasets)` lists what is there"),
    (ingest_nothing, r"Run `visionloop (ingest FOLDER)` once"),
    (verify_nothing, r"Run `visionloop (ingest PATH --verify)`"),
    (lose_the_pin, r"Run `visionloop (ingest FOLDER)`"),
    (break_the_pin, r"`visionloop (ingest)` pins the newest"),
    (pin_an_older_one, r"`visionloop (datasets drop \d)` takes that one back"),
    (drop_an_older_one, r"Drop (2) first"),
    (drop_an_older_one, r"`visionloop (datasets drop --source NAME)`"),
    (bring_a_folder_of_new_classes, r"`(--allow-new-classes)` with the same command, once"),
    (sort_anew, r"`(--relabel)` with the same command"),
    (sort_anew_in_a_declared_source, r"`visionloop (ingest --relabel)` takes"),
    (delete_in_a_declared_source, r"`visionloop (ingest --prune)` takes out"),
    (have_too_many_of_a_class, r"say `(--prune)`"),
    (prune, r"`visionloop (datasets drop \d)` takes that back"),
    (hold_two_ways_to_read_it, r"Say `visionloop (ingest \S+)` for the labels of the table"),
    (hold_two_ways_to_read_it, r"or `visionloop (ingest \S+ --pattern '\{label\}/')` for those of the folders"),
    (lose_an_image, r"`visionloop (ingest PATH --name photos --verify)`"),
    (lose_an_image, r"`visionloop (forget \w{12} --why lost)`"),
]


@pytest.mark.parametrize(("do", "pattern"), ADVICE, ids=[f"{do.__name__}-{i}" for i, (do, _) in enumerate(ADVICE)])
def test_the_advice_is_typed_and_works(desk: PullDesk, do: Callable[[PullDesk], str], pattern: str) -> None:
    told = do(desk)
    found = re.search(pattern, told)
    assert found, told
    words = found[1].replace("'", "").split()
    words = [*map(str, ("ingest", *desk.what)), *words] if words[0].startswith("--") else words
    words = ["datasets", "drop", *words] if words[0].isdigit() else words
    names = {"PATH": str(desk.photos), "FOLDER": str(desk.photos), "NAME": "more"}
    words = [names.get(word, word) for word in words]
    said = desk.run(*words, *(["--yes"] if words[0] == "forget" else []))
    assert said
    if words[0] == "ingest":  # the trouble is over: it is not told again
        again = desk.run(*(word for word in words if word not in ("--relabel", "--prune", "--verify")))
        assert not re.search(pattern, again)
    if do in (lose_the_pin, break_the_pin, lose_an_image):
        desk.run("prepare")


def test_a_correction_of_an_image_that_was_taken_out_waits_for_it(desk: PullDesk) -> None:
    desk.pull()
    row = desk.rows()["photos:cat/0.png"]
    (desk.home / "corrections.csv").write_text(f"sha256,old,new\n{row.sha256[:12]},cat,dog\n")
    desk.write("  corrections: corrections.csv\n")
    desk.pull()
    path = desk.photos / "cat" / "0.png"
    data = path.read_bytes()
    path.unlink()
    desk.pull("--prune")
    (desk.photos / "dog" / "new.png").write_bytes(make_image(900))
    desk.pull()
    path.write_bytes(data)
    desk.pull()
    assert desk.labels()["cat/0.png"] == "dog"


def test_an_image_that_a_pull_with_a_pattern_brought_is_mended_by_the_same_options(desk: PullDesk) -> None:
    flat = desk.home.parent / "flat"
    flat.mkdir()
    for path in desk.photos.rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}.{path.name}")
    words = ("ingest", flat, "--name", "flat", "--pattern", "{label}.*.png")
    desk.run(*words)
    sha256 = next(iter(desk.rows().values())).sha256
    desk.store.delete(f"images/{sha256[:2]}/{sha256}")
    assert "`visionloop ingest PATH --name flat --verify` (with the options of then)" in desk.run("prepare", code=2)
    desk.run(*words, "--verify")
    desk.run("prepare")


def test_monitor_names_what_the_settings_lack() -> None:
    plain = name_next("fine", Params(name="pets"))
    assert plain.startswith("`serve.keep_images` in params.yaml keeps images") and "review --serve" not in plain
    assert plain.endswith("`schedule.monitor` in params.yaml judges the next window by itself under `visionloop up`")
    whole = Params.model_validate(
        {"name": "pets", "serve": {"keep_images": {"random": 0.1}}, "schedule": {"monitor": "0 4 * * *"}}
    )
    assert name_next("fine", whole) == "`visionloop review --serve` asks for the labels worth having"
    assert name_next("drift", whole).endswith("`visionloop triggers decide` says whether a retrain is due")
