"""The Python interface: a model that answers, and a workspace as tables. For notebooks and programs of others.

`visionloop/__init__.py` hands out what is here. Prints nothing, configures nothing, needs no torch.
"""

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
from numpy.typing import NDArray

from visionloop.data.inputs import ImageInput, is_one_image
from visionloop.data.manifest import list_versions, load_pin, load_version, make_image_key
from visionloop.data.parts import iterate_version
from visionloop.errors import DatasetError, ImageError, SettingsError, describe_install
from visionloop.params import load_params
from visionloop.predictor import Predictor, raise_errors
from visionloop.promotion.gate import PASSED
from visionloop.promotion.ledger import read_decisions, read_history
from visionloop.promotion.models import load_model
from visionloop.records import LABEL_SEPARATOR, SIDES, Card, Prediction
from visionloop.runs import COLUMNS, read_marks
from visionloop.settings import QUIET_TOOLS, load_settings
from visionloop.tracking import DIGEST_TAG
from visionloop.workspace import Workspace, connect

if TYPE_CHECKING:
    import pandas as pd

SHOWN_CLASSES = 5


class Model:
    """A checked model. Any number of threads may use it at once; make it after a fork, not before."""

    def __init__(self, predictor: Predictor, address: str) -> None:
        self._predictor, self._address = predictor, address

    def __repr__(self) -> str:
        card, names = self.card, self.classes[:SHOWN_CLASSES]
        more = "" if len(names) == len(self.classes) else f", ... ({len(self.classes)} in all)"
        height, width = card.image_size
        return (
            f"<visionloop.Model {card.name}: {card.task} of {', '.join(names)}{more}; {width} x {height} px;"
            f" dataset version {card.dataset.get('version')}; bundle {self.digest[:12]} from {self._address}>"
        )

    @property
    def card(self) -> Card:
        """What is on the model's card: task, classes, image size, thresholds, dataset, params."""
        return self._predictor.card

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, sorted."""
        return self.card.classes

    @property
    def digest(self) -> str:
        """The sha256 (hex) that names this model everywhere."""
        return self._predictor.digest

    # A text is one image, though it is an iterable of texts as well: hence the overlap.
    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: ImageInput, *, on_error: Literal["raise"] = "raise"
    ) -> Prediction: ...
    @overload
    def predict(self, images: Iterable[ImageInput], *, on_error: Literal["raise"] = "raise") -> list[Prediction]: ...
    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: ImageInput, *, on_error: Literal["return"]
    ) -> Prediction | ImageError: ...
    @overload
    def predict(
        self, images: Iterable[ImageInput], *, on_error: Literal["return"]
    ) -> list[Prediction | ImageError]: ...

    def predict(
        self, images: ImageInput | Iterable[ImageInput], *, on_error: Literal["raise", "return"] = "raise"
    ) -> Prediction | ImageError | Sequence[Prediction | ImageError]:
        """Answer for one image, or for many: a list of answers in their order. An empty list has none.

        An image is a path, the bytes of an image file, an image of Pillow, or a numpy array of uint8: (h, w, 3)
        RGB, (h, w) grey or (h, w, 4) RGB and alpha. Many are a list or any other iterable, or an array (n, h, w, 3).
        At most 64 images are taken from it at a time, fewer if the model's images are large.

        `on_error="return"`: an image that cannot be used gets its ImageError in place of an answer.

        Raises:
            ImageError: the first image that cannot be used; with "return" never.
        """
        _check_choice("predict", on_error, ("raise", "return"))
        one, many = _list_images(images)
        answers = self._predictor.predict_each(many)
        done = raise_errors(answers) if on_error == "raise" else list(answers)
        return done[0] if one else done

    def embed(
        self, images: ImageInput | Iterable[ImageInput], *, on_error: Literal["raise", "nan"] = "raise"
    ) -> NDArray[np.float32]:
        """Return the embeddings (n, d) of n images, float32; one image is n = 1. Images as for `predict`.

        `on_error="nan"`: the row of an image that cannot be used is NaN.

        Raises:
            ImageError: the first image that cannot be used; with "nan" never.
        """
        _check_choice("embed", on_error, ("raise", "nan"))
        answers = self._predictor.embed_each(_list_images(images)[1])
        rows = raise_errors(answers) if on_error == "raise" else list(answers)
        good = [row for row in rows if not isinstance(row, ImageError)]
        size = len(good[0]) if good else self._predictor.embedding_size
        vectors = np.full((len(rows), size), np.nan, np.float32)
        if good:
            vectors[[not isinstance(row, ImageError) for row in rows]] = good
        return vectors


def load(address: str | os.PathLike[str], *, workspace: str | os.PathLike[str] | Workspace | None = None) -> Model:
    """Load a model, after a check of its digests and of its golden answers.

    `address`: the folder of a bundle; `NAME@champion` or `NAME@3` (an entry of the ledger), in the store of the
    workspace; or `s3://BUCKET/PREFIX/bundles/DIGEST`. The workspace is the one that VISIONLOOP_HOME names or that the
    current folder is in, if none is given. With one given, a relative folder is below it.

    Raises:
        SettingsError: the address is none, or there is no workspace.
        PromotionError: the name is not known in the store, or has no champion.
        BundleError: the bundle is missing, incomplete or damaged, or answers differently on this machine.
        StoreError: the store cannot be read.
    """
    shown = str(address)
    if workspace is not None and _is_relative_folder(address):
        address = _open(workspace).settings.home / address
    return Model(load_model(address, lambda: _open(workspace)), shown)


def open_workspace(folder: str | os.PathLike[str] | None = None) -> "WorkspaceTables":
    """Open the workspace at a folder; without one that of VISIONLOOP_HOME, or of the current folder.

    Raises:
        SettingsError, ParamsError: there is no workspace, or its params.yaml is wrong.
    """
    return WorkspaceTables(**vars(_open(folder)))


class WorkspaceTables(Workspace):
    """A workspace whose datasets, runs, decisions and promotions are tables of pandas. It is only read.

    But for `similar`, which keeps the embeddings that it computes.

    Every method raises SettingsError where pandas is not installed (it comes with the extra `train`), and StoreError or
    TrackingError where the store or MLflow cannot be read.
    """

    def datasets(self) -> "pd.DataFrame":
        """Return the versions of the dataset, oldest first: one row each. `pinned` is the one in use."""
        try:
            pinned = load_pin(self.settings.pin_path).version
        except DatasetError:
            pinned = None
        keys = ("version", "digest", "num_images", "num_added", "num_rejected", "num_leaks", "classes", "sources")
        rows = [
            {
                **{key: getattr(one, key) for key in keys},
                **{side: sum(one.counts.get(side, {}).values()) for side in SIDES},
                "pinned": one.version == pinned,
                "created_at": one.created_at,
            }
            for one in list_versions(self.store, self.name)
        ]
        return _make_frame(rows, [*keys, *SIDES, "pinned", "created_at"], times=("created_at",))

    def images(self, version: int | None = None) -> "pd.DataFrame":
        """Return the images of a version (default: the pinned one), one row each, in the order of their sha256.

        `label` holds the labels as one text, `origin` the first place where the image was found. Raises DatasetError.
        """
        number = version if version is not None else load_pin(self.settings.pin_path).version
        records = iterate_version(self.store, load_version(self.store, self.name, number))
        keys = ("sha256", "side", "labels", "width", "height", "format", "num_bytes", "group", "captured_at")
        rows = [
            {
                "origin": one.origins[0] if one.origins else None,
                "label": LABEL_SEPARATOR.join(one.labels),
                **{key: getattr(one, key) for key in keys},
                "source": one.sources[0] if one.sources else None,
                "origins": one.origins,
            }
            for one in records
        ]
        return _make_frame(rows, ["origin", "label", *keys, "source", "origins"])

    def read_image(self, sha256: str) -> bytes:
        """Return the bytes of an image of a dataset. Raises ObjectMissing, StoreError."""
        return self.store.get(make_image_key(sha256))

    def similar(
        self, images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], k: int = 8, *, encoder: str = "auto"
    ) -> "pd.DataFrame":
        """Return the k images of the prepared data that are nearest to each image, as `visionloop similar`.

        An image is the path of a file, or the sha256 of an image of the dataset, or its first eight digits. A row for
        each match, nearest first: `image` is what was asked, `distance` the cosine distance (0 to 2), `same` says that
        the files are equal. Embeddings that the store does not have are computed into it; of a large dataset the
        vectors are kept for the next question, in .visionloop/features.

        Raises:
            SourceError, ImageError: an image is not there, or cannot be used.
            SettingsError, PromotionError: there is no such encoder, or k is below 1.
            DatasetError: there is no prepared data.
        """
        from visionloop.data.shards import load_prepared
        from visionloop.features.album import choose_encoder, load_album_of_few
        from visionloop.features.similar import ask
        from visionloop.promotion.models import fetch_champion

        if k < 1:
            raise SettingsError("similar", f"got k = {k}", "1 or more")
        names = [os.fspath(one) for one in ([images] if isinstance(images, str | os.PathLike) else images)]
        prepared, size = load_prepared(self.settings.prepared_dir), self.params.embed.batch_size
        chosen, limit = choose_encoder(self, prepared, encoder, fetch_champion), self.params.ingest.max_pixels
        done = ask(lambda: load_album_of_few(self, prepared, chosen, batch_size=size), names, k, max_pixels=limit)
        rows = [
            {
                "image": name,
                "distance": match.distance,
                "same": match.is_same,
                "sha256": done.album.prepared.sha256_n[match.row],
                "label": LABEL_SEPARATOR.join(done.album.prepared.labels(match.row)),
                "side": done.album.records[match.row].side,
                "origin": done.album.get_origin(match.row),
            }
            for name, matches in zip(names, done.found, strict=True)
            for match in matches
        ]
        return _make_frame(rows, ["image", "distance", "same", "sha256", "label", "side", "origin"])

    def runs(self, *, trials: bool = False) -> "pd.DataFrame":
        """Return the trainings in MLflow, newest first, as `visionloop runs`; with `trials` also those of `tune`.

        Behind the columns of that command are all parameters and figures, as `params.KEY` and `metrics.KEY`.
        """
        _require("mlflow")
        marks, kinds = read_marks(self), {"train", "trial"} if trials else {"train"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "IProgress not found")  # MLflow wants a bar, and shows none
            found = list(self.tracking.iterate_runs())
        rows = [
            {
                **{name.replace(" ", "_"): read(run) for name, read in COLUMNS.items()},
                "bundle": run.tags.get(DIGEST_TAG),
                "champion": "champion" in marks.of(run).split(),
                "candidate": "candidate" in marks.of(run).split(),
                **{f"params.{key}": value for key, value in sorted(run.params.items())},
                **{f"metrics.{key}": value for key, value in sorted(run.metrics.items())},
            }
            for run in found
            if run.kind in kinds
        ]
        return _make_frame(rows, [*(name.replace(" ", "_") for name in COLUMNS), "bundle", "champion", "candidate"])

    def decisions(self) -> "pd.DataFrame":
        """Return what the gate decided, oldest first. `held_back_by` are the rules that did not pass.

        `accuracy` and the other figures are the candidate's, `champion_accuracy` and so on those of the champion.
        """
        keys = ("number", "verdict", "candidate", "champion", "num_test", "run_id", "decided_at")
        rows = [
            {
                **{key: getattr(one, key) for key in keys},
                "passed": one.verdict == PASSED,
                "held_back_by": tuple(rule.rule for rule in one.rules if rule.holds_back),
                "dataset_version": one.dataset.get("version"),
                **{name: figure["value"] for name, figure in one.metrics.items()},
                **{f"champion_{name}": figure["value"] for name, figure in one.champion_metrics.items()},
            }
            for one in read_decisions(self.store, self.name)
        ]
        return _make_frame(rows, [*keys, "passed", "held_back_by", "dataset_version"], times=("decided_at",))

    def history(self) -> "pd.DataFrame":
        """Return every promotion and rollback, oldest first, as `visionloop history`; the last one is the champion."""
        entries = read_history(self.store, self.name)
        keys = ("number", "action", "bundle", "previous", "model_version", "decision", "run_id", "by", "why", "at")
        rows = [
            {
                **{key: asdict(one)[key] for key in keys},
                "dataset_version": one.dataset.get("version"),
                "champion": one is entries[-1],
            }
            for one in entries
        ]
        return _make_frame(rows, [*keys, "dataset_version", "champion"], times=("at",))


def _open(folder: str | os.PathLike[str] | Workspace | None) -> Workspace:
    """Open a workspace. Telemetry of tools is off from here on; the environment stays as it is otherwise."""
    if isinstance(folder, Workspace):
        return folder
    for name, value in QUIET_TOOLS.items():
        os.environ.setdefault(name, value)
    settings = load_settings(os.environ, None if folder is None else Path(folder).expanduser())
    return connect(settings, load_params(settings.params_path))


def _is_relative_folder(address: str | os.PathLike[str]) -> bool:
    text = str(address)
    is_name = isinstance(address, str) and ("@" in text or "://" in text)
    return not is_name and not Path(text).expanduser().is_absolute()


def _list_images(images: ImageInput | Iterable[ImageInput]) -> tuple[bool, Iterable[ImageInput]]:
    """Say whether this is one image, and return it as a list."""
    if is_one_image(images):
        return True, [cast("ImageInput", images)]
    return False, cast("Iterable[ImageInput]", images)


def _check_choice(function: str, on_error: str, choices: tuple[str, ...]) -> None:
    if on_error not in choices:
        raise SettingsError(f"{function}(on_error=...)", f"got {on_error!r}", f"one of {', '.join(choices)}")


def _require(package: str) -> None:
    """Raise SettingsError if a package is not installed. A folder of the same name would satisfy an import."""
    try:
        version(package)
    except PackageNotFoundError as exc:
        todo = f"Run `{describe_install('train')}`."
        raise SettingsError(package, "is not installed", "it, for tables", todo) from exc


def _make_frame(rows: Sequence[dict[str, Any]], columns: Sequence[str], times: Sequence[str] = ()) -> "pd.DataFrame":
    """Make a table; `columns` come first and are there without a row, too. `times` become timestamps, UTC."""
    _require("pandas")
    import pandas as pd

    names = dict.fromkeys([*columns, *(key for row in rows for key in row)])
    frame = pd.DataFrame(list(rows), columns=list(names))
    for name in times:
        frame[name] = pd.to_datetime(frame[name], utc=True, format="ISO8601")
    return frame
