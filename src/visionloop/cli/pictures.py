"""Pictures for people: images of a dataset version with their labels, its worst leaks, and images with an answer."""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visionloop.data.contact_sheet import Cell, Panel
    from visionloop.data.leaks import Leaks
    from visionloop.predict.files import FilePrediction
    from visionloop.predictor import Predictor
    from visionloop.records import DatasetVersion, ImageRecord, Prediction
    from visionloop.store import ObjectStore

NUM_IMAGES = 25
NUM_PAIRS = 8
CELL_PX = 160
LONGEST_STEM = 200  # bytes: with a number and .png it fits every file system
NUM_OTHERS = 3
SHEET_IMAGES, SHEET_BARS = 24, 10


def choose_images(records: "Iterable[ImageRecord]") -> "list[ImageRecord]":
    """Choose 25 images spread over the classes, then over the sides; the same version gives the same choice.

    They come in the order of sha256: a digest is as good as a die, and the same for everybody. Of each class and side
    the first are held; of more classes than there are places, the first one.
    """
    by_class: dict[tuple[str, ...], dict[str, list[ImageRecord]]] = {}
    for record in records:
        some = by_class.setdefault(record.labels, {}).setdefault(record.side, [])
        if len(some) < (NUM_IMAGES if len(by_class) <= NUM_IMAGES else 1):
            some.append(record)
    names = sorted(by_class)
    if len(names) > NUM_IMAGES:
        names = [names[i * len(names) // NUM_IMAGES] for i in range(NUM_IMAGES)]
    ranked = {name: _take_turns(by_class[name]) for name in names}
    chosen: list[ImageRecord] = []
    for depth in range(NUM_IMAGES):
        for name in names:
            if depth < len(ranked[name]) and len(chosen) < NUM_IMAGES:
                chosen.append(ranked[name][depth])
    return sorted(chosen, key=lambda r: (r.labels, r.sha256))


def draw_images(store: "ObjectStore", version: "DatasetVersion", records: "Iterable[ImageRecord]") -> bytes:
    """Return the contact sheet of a version as PNG."""
    from visionloop.data.contact_sheet import draw_contact_sheet

    chosen = choose_images(records)
    cells = [_make_cell(store, record) for record in chosen]
    title = f"{version.name} version {version.version}: {len(chosen)} of {version.num_images:,} images"
    return draw_contact_sheet(cells, title, cell_px=CELL_PX)


def draw_leaks(store: "ObjectStore", leaks: "Leaks") -> bytes | None:
    """Return the worst pairs of a leak report as PNG; None when it has no pair of images."""
    from visionloop.data.leaks import make_leak_picture
    from visionloop.data.manifest import make_image_key

    if not any(row.other for row in leaks.rows):
        return None
    return make_leak_picture(leaks, lambda sha256: store.get(make_image_key(sha256)), shown=NUM_PAIRS)


class AnswerPictures:
    """A folder that takes each answered image with its answer below it. What is there already is never overwritten.

    Raises:
        SettingsError: the folder cannot be made, holds images that are asked about, or lies in a folder that is.
    """

    def __init__(self, folder: Path, files: Sequence[Path], asked: Sequence[str] = ()) -> None:
        from visionloop.errors import SettingsError
        from visionloop.ingest.paths.names import is_passed

        self.folder, self.files, self.number = folder, files, 0
        self._last: Counter[str] = Counter()
        place = folder.resolve()
        if inside := next((file for file in files if place in _list_folders(file)), None):
            todo = "Name another folder, or other images."
            raise SettingsError(f"--pictures {folder}", f"holds {inside.name}, which is asked about", "a folder", todo)
        for root in (Path(text).expanduser().resolve() for text in asked):
            if root.is_dir() and root in place.parents and not is_passed(f"{place.relative_to(root).as_posix()}/"):
                todo = "Name another folder: the next answers would be about its pictures."
                raise SettingsError(
                    f"--pictures {folder}", f"lies in {root.name}, which is asked about", "a folder", todo
                )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SettingsError(f"--pictures {folder}", f"cannot be made ({exc.strerror})", "a folder") from exc

    def draw(self, answers: "Iterable[FilePrediction]", classes: Sequence[str]) -> "Iterator[FilePrediction]":
        """Pass the answers for the files on, in their order, and save a picture of each image that has one."""
        from visionloop.data.contact_sheet import draw_answered
        from visionloop.data.fonts import number_names
        from visionloop.data.images import decode_image
        from visionloop.errors import ImageError

        shown = number_names(classes)
        for path, answer in zip(self.files, answers, strict=True):
            yield answer
            if answer.prediction is None or answer.video:
                continue
            try:
                image = decode_image(path.read_bytes(), str(path))
            except (ImageError, OSError):  # changed or gone since it was answered
                continue
            title, note = describe_picture(answer, shown)
            png = draw_answered(image, title, note, is_unsure=bool(answer.prediction.abstained))
            _, self._last[path.stem] = write_new_picture(self.folder, path.stem, png, after=self._last[path.stem])
            self.number += 1


def _list_folders(file: Path) -> list[Path]:
    """Return the folders that a file lies in, by its name, and by where the links of its name lead to."""
    named = Path(os.path.normpath(file.absolute()))
    return [*named.parents, *(file.parent.resolve() / file.name).parents]


def describe_picture(answer: "FilePrediction", shown: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the pieces of two lines: the answer, or "don't know"; and what else it may be, or why not."""
    prediction = answer.prediction
    assert prediction is not None
    chosen = (prediction.prediction,) if prediction.labels is None else prediction.labels
    said = [", ".join(shown[one] for one in chosen) or "no label", f"{prediction.confidence:.0%}"]
    if prediction.abstained:
        return ["don't know"], ["at best", *said, f"({prediction.abstained})"]
    ranked = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])
    others = [(shown[name], f"{share:.0%}") for name, share in ranked if name not in chosen]
    return said, [piece for pair in others[:NUM_OTHERS] for piece in pair]


def draw_sheet(
    predictor: "Predictor", files: Sequence[Path], notes: Sequence[str] = (), *, most: int = SHEET_IMAGES
) -> bytes:
    """Draw some of the images, evenly spaced, with their answers and the likeliest classes as bars, as PNG.

    `notes` stand below them: which files are not there, and why.
    Where an image's folder is named as a class, that is taken for the truth: the title is then green or red.
    """
    from visionloop.data.contact_sheet import draw_prediction_sheet
    from visionloop.errors import ImageError
    from visionloop.ingest.paths.listing import is_video_name
    from visionloop.ingest.paths.names import escape_name

    images = [path for path in files if not is_video_name(path.name)]
    number = min(most, len(images))
    chosen = [images[round(i * (len(images) - 1) / max(1, number - 1))] for i in range(number)]
    panels, gone = [], []
    for path, answer in zip(chosen, predictor.predict_each(chosen), strict=True):
        if isinstance(answer, ImageError):
            gone.append(f"{escape_name(str(path))}: {answer.found}")
        else:
            panels.append(_make_panel(predictor, path, answer))
    title = f"{len(panels)} of {len(images):,} images, bundle {predictor.digest[:12]}"
    return draw_prediction_sheet(panels, title, [*notes, *gone])


def _make_panel(predictor: "Predictor", path: Path, answer: "Prediction") -> "Panel":
    from visionloop.data.contact_sheet import Panel
    from visionloop.data.fonts import number_names
    from visionloop.data.inputs import load_input
    from visionloop.ingest.paths.names import escape_name

    card, truth = predictor.card, path.parent.name
    shown = number_names(card.classes)
    ranked = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])[:SHEET_BARS]
    known = truth if truth in card.classes else ""
    said = answer.labels if answer.labels is not None else (answer.prediction,)
    return Panel(
        image=load_input(path, str(path), size_hw=card.image_size, resize=card.resize, max_pixels=card.max_pixels),
        title=f"{' '.join(shown[one] for one in said) or 'no label'} {answer.confidence:.0%}"
        + (f" ({shown[known]})" if known else ""),
        bars=[(shown[name], share) for name, share in ranked],
        is_right=said == (known,) if known else None,
        truth=frozenset({shown.get(known, "")}),
        note=escape_name(path.name),
    )


def require_image(files: Sequence[Path], asked: Mapping[str, object]) -> None:
    """Raise SettingsError if pictures of the answers are asked for, by an option's name, and all files are videos."""
    from visionloop.errors import SettingsError
    from visionloop.ingest.paths.listing import is_video_name

    if all(is_video_name(path.name) for path in files) and (name := next((one for one in asked if asked[one]), None)):
        raise SettingsError(name, "is for images, and there are only videos", "an image", "Leave it out.")


def require_png(path: Path | None, option: str) -> None:
    """Raise SettingsError unless a picture's name, if there is one, ends in .png; DiskError: it cannot be there."""
    from visionloop.errors import SettingsError

    if path and path.suffix.lower() != ".png":
        raise SettingsError(option, f"got {path.name!r}", "a file that ends in .png")
    require_place(path, option)


def require_place(path: Path | None, option: str) -> None:
    """Raise DiskError if a picture that somebody names cannot be written there: its folder is not made for him."""
    from visionloop.workfolder import check_place

    if path:
        check_place(path, f"{option} {path}")


def write_picture(path: Path, png: bytes) -> None:
    """Write a picture, making its folder. Raises SettingsError."""
    from visionloop.errors import SettingsError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png)
    except OSError as exc:
        raise SettingsError(f"picture {path}", f"cannot be written ({exc.strerror})", "a place to write to") from exc


def write_new_picture(folder: Path, stem: str, png: bytes, *, after: int = 0) -> tuple[Path, int]:
    """Write a picture under a name, with a number where there is one already; return where it is, and the number.

    `after`: as many numbers are known to be taken. Raises SettingsError.
    """
    from visionloop.errors import SettingsError

    while len(stem.encode(errors="surrogateescape")) > LONGEST_STEM:
        stem = stem[:-1]
    for number in itertools.count(after + 1):
        path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.png"
        try:
            with path.open("xb") as file:
                file.write(png)
        except FileExistsError:
            continue
        except OSError as exc:
            path.unlink(missing_ok=True)
            found = f"cannot be written ({exc.strerror})"
            raise SettingsError(f"picture {path}", found, "a folder on a disk with free space") from exc
        return path, number
    raise AssertionError


def _take_turns(by_side: "Mapping[str, Sequence[ImageRecord]]") -> "list[ImageRecord]":
    """Return the images of a class so that its sides take turns."""
    depths = [(depth, side, record) for side, some in by_side.items() for depth, record in enumerate(some)]
    return [record for _, _, record in sorted(depths, key=lambda d: (d[0], d[1]))]


def _make_cell(store: "ObjectStore", record: "ImageRecord") -> "Cell":
    """Decode one image at the size of its cell; one that is missing or damaged is a grey square that says so."""
    import numpy as np

    from visionloop.data.contact_sheet import Cell
    from visionloop.data.images import load_array
    from visionloop.data.manifest import make_image_key
    from visionloop.errors import ImageError, ObjectMissing

    label = ", ".join(record.labels) or "(unlabelled)"
    ratio = min(1.0, 2 * CELL_PX / max(record.width, record.height))
    size_hw = max(1, round(record.height * ratio)), max(1, round(record.width * ratio))
    try:
        data = store.get(make_image_key(record.sha256))
        array = load_array(data, record.sha256, size_hw=size_hw, resize="squash", max_pixels=None)
    except (ImageError, ObjectMissing):
        return Cell(np.full((CELL_PX, CELL_PX, 3), 200, np.uint8), label, "missing or damaged in the store")
    return Cell(array, label, f"{record.side}  {record.width} x {record.height}")
