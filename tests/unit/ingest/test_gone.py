"""A place that is read again after files were deleted, renamed or edited; copies, and classes without an image."""

import io
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fakes import make_image, write_photos
from pull_desk import PullDesk, find_files, move
from visionloop.data.manifest import list_versions
from visionloop.data.parts import load_version_records
from visionloop.ingest.journal import make_journal_path
from visionloop.settings import load_settings


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PullDesk:
    return PullDesk(tmp_path, monkeypatch, capsys)


def zip_up(desk: PullDesk) -> None:
    with zipfile.ZipFile(desk.home.parent / "photos.zip", "w") as archive:
        for path in sorted(desk.photos.rglob("*.png")):
            archive.write(path, path.relative_to(desk.photos).as_posix())


# Deleted, renamed, edited


@pytest.mark.parametrize("kind", ["folder", "zip", "table"])
def test_images_that_are_gone_are_told_at_each_pull_and_taken_out_on_request(desk: PullDesk, kind: str) -> None:
    write_photos(desk.photos)
    if kind == "table":
        rows = "".join(f"{c}/{p.name},{c}\n" for c in ("cat", "dog") for p in sorted((desk.photos / c).iterdir()))
        (desk.photos / "labels.csv").write_text("file,label\n" + rows)
        desk.what = (desk.photos / "labels.csv", "--name", "photos")
    zip_up(desk)
    desk.what = (desk.home.parent / "photos.zip", "--name", "photos") if kind == "zip" else desk.what
    desk.pull()
    before = desk.rows()
    for path in (desk.photos / "cat" / "0.png", desk.photos / "dog" / "0.png", desk.photos / "dog" / "1.png"):
        path.unlink()
    zip_up(desk)
    for _ in range(2):
        told = desk.pull()
        assert "gone: 3 images are no longer in the source, and in the dataset all the same:" in told
        assert "versions are cumulative; `--prune` with the same command takes out what is gone" in told
    assert desk.rows() == before
    told = desk.pull("--prune")
    assert "0 new images, 3 taken out, 17 in all" in told
    back = re.search(r"`visionloop (datasets drop \d)` takes that back", told)
    assert back
    assert len(desk.rows()) == 17
    assert "gone:" not in desk.pull()
    desk.run(*back[1].split())
    assert desk.rows() == before


def test_an_image_that_was_taken_out_and_comes_again_has_its_side(desk: PullDesk) -> None:
    write_photos(desk.photos, 20)
    desk.pull()
    sides = {row.sha256: row.side for row in desk.rows().values()}
    (some := find_files(desk.photos / "cat", 10)) and move(some, desk.home.parent / "away")
    desk.pull("--prune")
    assert len(desk.rows()) == 30
    move(find_files(desk.home.parent / "away", 10), desk.photos / "cat")
    desk.pull()
    assert {row.sha256: row.side for row in desk.rows().values()} == sides


def test_a_near_duplicate_of_a_test_image_that_is_taken_out_stays_on_test(desk: PullDesk) -> None:
    for name, first in (("cat", 0), ("dog", 30)):
        for seed in range(first, first + 30):
            place = desk.photos / name / f"{seed}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(make_image(seed, size_hw=(64, 64)))
    desk.pull()
    tests = {place: row for place, row in desk.rows().items() if row.side == "test"}
    for place in tests:
        path = desk.photos / place.partition(":")[2]
        Image.open(path).save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    desk.pull("--prune")
    rows = desk.rows()
    assert not rows.keys() & tests.keys()
    assert {rows[place.replace(".png", ".jpg")].side for place in tests} == {"test"}


def test_what_would_leave_one_class_is_not_taken_out(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.pull()
    shutil.rmtree(desk.photos / "cat")
    assert "gone: 10 images are" in desk.pull()
    assert "has 1 class (dog); expected two classes or more" in desk.pull("--prune", code=2)
    assert len(desk.rows()) == 20


def test_renamed_files_are_told_once_and_bring_no_image(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.pull()
    for path in find_files(desk.photos / "cat", 3):
        path.rename(path.with_name(f"new {path.name}"))
    (desk.photos / "dog" / "deep").mkdir()
    (desk.photos / "dog" / "0.png").rename(desk.photos / "dog" / "deep" / "0.png")
    told = desk.pull()
    assert "renamed: 4 images lie elsewhere now, with the same label (photos:cat/0.png is photos:cat/new 0.png)" in told
    assert "gone:" not in told
    assert len(desk.rows()) == 20
    told = desk.pull()
    assert "nothing new" in told
    assert "renamed:" not in told


def test_an_edited_image_is_new_and_the_one_before_is_gone(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.pull()
    for path in find_files(desk.photos / "cat", 2):
        path.write_bytes(make_image(500 + int(path.stem)))
    told = desk.pull()
    assert "gone: 2 images are no longer in the source" in told
    assert "where 2 lay are other bytes now" in told
    assert len(load_version_records(desk.store, list_versions(desk.store, "pets")[-1])) == 22
    desk.pull("--prune")
    assert len(desk.rows()) == 20


def test_an_image_saved_again_in_another_class_is_told(desk: PullDesk) -> None:
    write_photos(desk.photos)
    big = desk.photos / "cat" / "big.png"
    big.write_bytes(make_image(77, size_hw=(64, 64)))
    desk.pull()
    Image.open(big).save(desk.photos / "dog" / "big.jpg", quality=90)
    assert "saved again:" not in desk.pull(), "the first is still there"
    big.unlink()
    told = desk.pull()
    assert "saved again: 1 image is a near duplicate of ones that are gone, under another label" in told
    assert "photos:dog/big.jpg (dog) of photos:cat/big.png (cat)" in told
    told = desk.pull("--prune")
    assert "saved again:" not in told
    assert [place for place in desk.labels() if "big" in place] == ["dog/big.jpg"]


# Not gone


def test_what_a_place_still_holds_is_not_gone_though_it_cannot_be_taken(desk: PullDesk) -> None:
    write_photos(desk.photos, 20)
    desk.pull()
    (desk.photos / "cat" / "0.png").write_bytes(b"cut off")
    told = desk.pull("--prune")
    assert "not_an_image" in told
    assert "gone:" not in told
    assert len(desk.rows()) == 40


def test_what_another_source_still_has_is_not_gone(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.pull()
    desk.run("ingest", shutil.copytree(desk.photos, desk.home.parent / "copy"), "--name", "copy")
    (desk.photos / "cat" / "0.png").unlink()
    assert "gone:" not in desk.pull()


def test_a_function_that_yields_only_what_is_new_tells_nothing_of_the_others(desk: PullDesk) -> None:
    (desk.home / "own.py").write_text(
        "from pathlib import Path\n"
        "def records(names):\n"
        "    for name in names:\n"
        "        yield {'id': name, 'image': Path(name), 'label': name.split('/')[-2]}\n"
    )
    write_photos(desk.photos)
    names = [str(path) for path in sorted(desk.photos.rglob("*.png"))]
    for some in (names, names[:3]):
        desk.write(f"  sources: [{{kind: python, function: 'own:records', name: own, options: {{names: {some}}}}}]\n")
        assert "gone:" not in desk.run("ingest", "--prune")
    assert len(desk.rows()) == 20


def test_a_converted_picture_is_not_gone(desk: PullDesk) -> None:
    write_photos(desk.photos)
    Image.open(desk.photos / "cat" / "0.png").save(desk.photos / "cat" / "x.bmp")
    desk.write("  convert: true\n")
    desk.pull()
    (desk.photos / "dog" / "new.png").write_bytes(make_image(900))
    assert "gone:" not in desk.pull()
    assert "photos:cat/x.bmp#png" in {origin for row in desk.rows().values() for origin in row.origins}


def test_without_its_journal_a_pull_says_the_same(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.pull()
    (desk.photos / "cat" / "0.png").unlink()
    told = desk.pull()
    make_journal_path(load_settings({}, desk.home)).unlink()
    assert [line for line in desk.pull().splitlines() if not line.startswith("checked")] == [
        line for line in told.splitlines() if not line.startswith("checked")
    ]


def test_a_dry_run_tells_which_places_are_not_there_and_which_have_another_label(desk: PullDesk) -> None:
    write_photos(desk.photos)
    assert "not there" not in desk.pull("--dry-run")
    desk.pull()
    told = desk.pull("--dry-run")
    assert "not there" not in told
    assert "labels:" not in told
    (desk.photos / "cat" / "0.png").unlink()
    (desk.photos / "dog" / "1.png").rename(desk.photos / "dog" / "one.png")
    told = desk.pull("--dry-run")
    assert "not there: 2 places of images of this dataset (photos:cat/0.png, photos:dog/1.png)" in told
    table = desk.photos / "labels.csv"
    table.write_text("file,label\ncat/1.png,dog\ncat/2.png,cat\n")
    told = desk.run("ingest", table, "--name", "photos", "--dry-run")
    assert "labels: 1 places have another label than in this dataset (photos:cat/1.png)" in told
    sha256 = next(row.sha256 for place, row in desk.rows().items() if place == "photos:cat/1.png")
    (desk.home / "corrections.csv").write_text(f"sha256,old,new\n{sha256},dog,cat\n")
    desk.write("  corrections: corrections.csv\n")
    assert "labels:" not in desk.run("ingest", table, "--name", "photos", "--dry-run")


# Copies, and classes of which nothing can be used


def test_byte_copies_are_counted(desk: PullDesk) -> None:
    write_photos(desk.photos)
    for number in range(12):
        shutil.copy(desk.photos / "cat" / f"{number % 2}.png", desk.photos / "cat" / f"copy {number}.png")
    for _ in range(2):
        told = desk.pull()
        assert "copies: 12 files are byte copies of others, counted once (photos:cat/copy 0.png is photos:cat/0" in told
        assert "32 files = 32 taken" in told
    assert len(desk.rows()) == 20


def test_a_conflict_is_no_copy(desk: PullDesk) -> None:
    write_photos(desk.photos)
    shutil.copy(desk.photos / "cat" / "0.png", desk.photos / "dog" / "again.png")
    assert "copies:" not in desk.pull()


@pytest.mark.parametrize(("number", "words"), [(3, "3 files, none of which can"), (1, "1 file, and it cannot")])
def test_a_class_without_a_usable_image_is_named(desk: PullDesk, number: int, words: str) -> None:
    write_photos(desk.photos, 100)
    (desk.photos / "rabbit").mkdir()
    for name in range(number):
        (desk.photos / "rabbit" / f"{name}.jpg").write_bytes(b"<html>")
    for _ in range(2):
        assert f"class 'rabbit': {words} be used" in desk.pull()


def test_a_class_whose_images_all_lie_in_another_class_too_is_named(desk: PullDesk) -> None:
    write_photos(desk.photos)
    (desk.photos / "rabbit").mkdir()
    for path in find_files(desk.photos / "cat", 2):
        shutil.copy(path, desk.photos / "rabbit")
    assert "class 'rabbit': 2 files, none of which can be used" in desk.pull()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("split", ["", "train/"])
def test_an_empty_class_folder_is_named(desk: PullDesk, split: str, dry: tuple[str, ...]) -> None:
    write_photos(desk.photos / split)
    if split:
        write_photos(desk.photos / "test", first=100)
    (desk.photos / split / "rabbit" / "deep").mkdir(parents=True)
    (desk.photos / split / "fox").mkdir()
    told = desk.pull(*dry)
    for name in ("rabbit", "fox"):
        assert f"the folder {split}{name}/ gives no image: it holds nothing" in told


# 12 bits in 16


def write_grey(path: Path, most: int, seed: int, *, sbit: int = 0) -> None:
    values = np.random.default_rng(seed).integers(0, most, (40, 40)).astype(np.uint16)
    values[0, 0] = most
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    data = buffer.getvalue()
    if sbit:
        chunk = b"sBIT" + bytes([sbit])
        data = data[:33] + b"\0\0\0\1" + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("mosts", "sbit", "told"),
    [
        ([4095] * 4, 0, "dark: 4 of the 4 images of photos with 16 bits a sample use the lowest 12 alone"),
        ([1023, 900, 4000, 3000], 0, "dark: 4 of the 4 images of photos with 16 bits a sample use the lowest 12 alone"),
        ([255] * 4, 0, "use the lowest 8 alone"),
        ([16383] * 4, 0, "use the lowest 14 alone"),
        ([4095, 3000, 65535, 60000], 0, "dark: 2 of the 4 images of photos with 16 bits a sample use the lowest 12"),
        ([4095] * 4, 12, ""),
        ([65535] * 4, 0, ""),
        ([16383, 9000, 65535, 60000], 0, ""),
    ],
)
def test_images_of_fewer_bits_than_their_file_are_told(desk: PullDesk, mosts: list[int], sbit: int, told: str) -> None:
    write_photos(desk.photos)
    for number, most in enumerate(mosts):
        write_grey(desk.photos / "cat" / f"grey {number}.png", most, number, sbit=sbit)
    for _ in range(2):
        said = desk.pull()
        assert told in said
        assert ("dark:" in said) == bool(told)
    (desk.photos / "dog" / "new.png").write_bytes(make_image(900))
    assert told in desk.pull(), "the journal knows it too"


def test_colours_of_12_bits_are_told_and_the_line_says_how_to_mend_them(desk: PullDesk) -> None:
    write_photos(desk.photos)
    raw = np.random.default_rng(0).integers(0, 4096, (40, 40, 3)).astype(">u2")
    rows = b"".join(b"\0" + raw[y].tobytes() for y in range(40))
    body = [(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in body
    )
    (desk.photos / "cat" / "colours.png").write_bytes(data)
    said = desk.pull()
    assert "use the lowest 12 alone, such as photos:cat/colours.png" in said
    assert "of 256 levels 17 are left" in said
    assert "or multiply by 16" in said
