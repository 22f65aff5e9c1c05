"""Copies of images, ingested by the real command: found, on one side, listed; and training after a random split."""

import io
import json
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shapes import visionloop_here, write_shapes
from visionloop.data.leaks import load_leaks, make_leak_picture
from visionloop.data.manifest import list_versions, make_image_key
from visionloop.data.parts import load_version_records
from visionloop.data.prepare import prepare
from visionloop.errors import SourceError
from visionloop.ingest.pull import PullReport, pull
from visionloop.params import FolderSource, load_params, make_params
from visionloop.records import ImageRecord
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.workspace import connect

NUM_PHOTOS = 25
TRAIN = {"backbone": "small_cnn", "max_epochs": 1, "batch_size": 16, "precision": "fp32"}
ORIENTATION = 0x0112
Way = Callable[[Image.Image], tuple[bytes, str]]


def make_photo(seed: int) -> Image.Image:
    """A picture with the spectrum of a photo: amplitude falls as 1/frequency; colours vary more slowly."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(160)[:, None, None], np.fft.fftfreq(240)[None, :, None]
    falling = 1 / np.maximum(np.hypot(x, y), 1 / 240)
    noise = rng.normal(size=(160, 240, 1)) + 0.4 * rng.normal(size=(160, 240, 3))
    values = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) * falling, axes=(0, 1)).real
    values = 255 * (values - values.min()) / (values.max() - values.min())
    return Image.fromarray(values.astype(np.uint8))


def save(image: Image.Image, kind: str, **how: object) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)  # type: ignore[arg-type]
    return buffer.getvalue(), {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]


def scale(image: Image.Image, ratio: float) -> Image.Image:
    return image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS)


def turn(image: Image.Image) -> tuple[bytes, str]:
    """Store the pixels a quarter turn off, with the flag that turns them back."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return save(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=90, exif=exif)


WAYS: dict[str, Way] = {
    "q50": lambda image: save(image, "JPEG", quality=50),
    "q75": lambda image: save(image, "JPEG", quality=75),
    "q95": lambda image: save(image, "JPEG", quality=95, progressive=True),
    "half": lambda image: save(scale(image, 0.5), "JPEG", quality=60),
    "larger": lambda image: save(scale(image, 1.5), "JPEG", quality=85),
    "webp": lambda image: save(image, "WEBP", quality=60),
    "turned": turn,
}


class Desk:
    """A workspace and its store, and photos with copies in folders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, LocalStore(folder / "store")
        (folder / "ws").mkdir()
        (folder / "ws" / "params.yaml").write_text("name: pets\n")

    def write(self, place: str, number: int, way: str) -> None:
        photo = make_photo(number)
        data, suffix = save(photo, "PNG") if way == "first" else WAYS[way](photo)
        path = self.folder / place / f"{number:03d}-{way}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def pull(self, place: str, **split: object) -> PullReport:
        params = make_params({"name": "pets", "ingest": {"split": split}})
        settings = load_settings({}, self.folder / "ws")
        source = FolderSource(kind="folder", path=str(self.folder / place), name="s")
        return pull(connect(settings, params, store=self.store), sources=[source], now="2026-01-01T00:00:00+00:00")

    def rows(self) -> list[ImageRecord]:
        return load_version_records(self.store, list_versions(self.store, "pets")[-1])


def get_photo(record: ImageRecord) -> str:
    return record.origins[0].rpartition("/")[2][:3]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_planted_duplicates_are_found_and_on_one_side(desk: Desk) -> None:
    """Half of the copies come with the photos, half a version later. Every copy gets the key of its photo."""
    for number in range(NUM_PHOTOS):
        for n, way in enumerate(("first", *WAYS)):
            place = "first" if way == "first" or (n + number) % 2 else "later"
            desk.write(f"{place}/{'cat' if number % 2 else 'dog'}", number, way)
    desk.pull("first")
    before = {r.sha256: r.side for r in desk.rows()}
    desk.pull("later")
    rows = desk.rows()
    assert len(rows) == NUM_PHOTOS * (1 + len(WAYS))
    assert all(r.side == before[r.sha256] for r in rows if r.sha256 in before)
    families: dict[str, list[ImageRecord]] = {}
    for record in rows:
        families.setdefault(get_photo(record), []).append(record)
    keys = {photo: Counter(r.key for r in family).most_common(1)[0] for photo, family in families.items()}
    assert sum(count for _, count in keys.values()) >= 0.99 * len(rows)
    assert all(len({r.side for r in family}) == 1 for family in families.values())
    assert not any(a[0] == b[0] for a, b in combinations(keys.values(), 2))
    assert {r.side for r in rows} == {"train", "val", "test"}


def test_given_sides_that_leak_are_reported_drawn_or_refused(desk: Desk) -> None:
    for number in range(12):
        desk.write(f"photos/train/{'cat' if number % 2 else 'dog'}", number, "first")
    for number in (2, 3, 20, 21):
        desk.write(f"photos/test/{'cat' if number % 2 else 'dog'}", number, "q75")
    with pytest.raises(SourceError, match=r"2 images leak to another side: s:train/(cat|dog)/00\d-first\.png"):
        desk.pull("photos", on_leak="fail")
    assert list_versions(desk.store, "pets") == []
    version = desk.pull("photos").version
    leaks = load_leaks(desk.store, version)
    assert {(r.kind, r.origins[0], r.other_origins[0]) for r in leaks.rows} == {
        ("across", "s:train/dog/002-first.png", "s:test/dog/002-q75.jpg"),
        ("across", "s:train/cat/003-first.png", "s:test/cat/003-q75.jpg"),
    }
    assert (version.num_leaks, sum(version.counts["test"].values())) == (2, 4)
    picture = make_leak_picture(leaks, lambda sha256: desk.store.get(make_image_key(sha256)))
    assert Image.open(io.BytesIO(picture)).size[0] > 640


def test_a_random_split_is_validated_on_its_test_side(desk: Desk) -> None:
    home, split = desk.folder / "ws", {"method": "random", "seed": 13, "fractions": [0.8, 0.2]}
    write_shapes(desk.folder / "photos", 20)
    (home / "params.yaml").write_text(
        json.dumps({"name": "pets", "ingest": {"split": split}, "prepare": {"image_size": 32}, "train": TRAIN})
    )
    version = desk.pull("photos", **split).version
    assert {side: sum(classes.values()) for side, classes in version.counts.items()} == {"train": 32, "test": 8}
    settings = load_settings({}, home)
    prepare(connect(settings, load_params(settings.params_path), store=desk.store))
    done = visionloop_here(home, "train", VISIONLOOP_STORE=desk.store.url)
    assert done.returncode == 0, done.stderr
    assert "an experiment (ingest.split.method: random): every epoch was judged on the test side" in done.stdout
    note = json.loads(next(settings.runs_dir.iterdir()).read_text())
    assert note["extra"]["validated_on"] == "test"
