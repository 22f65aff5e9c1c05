"""What the names of files and folders say: a side, a label, an image, or something that a system made. Pure."""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

from visionloop.errors import escape_text

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".hif"),
        *(".avif", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
SPLIT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("train", "training", "trn", "trainset", "trainingset", "traindata"), "train"),
        **dict.fromkeys(("trains", "trainval", "xtrain", "trainingsdaten", "apprentissage"), "train"),
        **dict.fromkeys(("vali", "vals", "xval"), "val"),
        **dict.fromkeys(("tests", "xtest", "testdaten", "valtest", "essai", "essais"), "test"),
        **dict.fromkeys(("testdev", "devtest", "testval", "testchallenge", "teststandard"), "test"),
        "minival": "val",
        **dict.fromkeys(("val", "valid", "validation", "validate", "validating", "dev", "valset", "validset"), "val"),
        **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout", "testset", "testdata"), "test"),
        **dict.fromkeys(("entrenamiento", "entrainement", "entraînement", "treino", "treinamento"), "train"),
        **dict.fromkeys(("addestramento", "обучение", "训练", "训练集", "訓練", "学習", "훈련", "학습"), "train"),
        **dict.fromkeys(("validierung", "validacion", "validación", "validacao", "validação"), "val"),
        **dict.fromkeys(("validazione", "验证", "验证集", "検証", "검증"), "val"),
        **dict.fromkeys(("prueba", "pruebas", "teste", "testes", "тест", "测试", "测试集", "テスト", "테스트"), "test"),
    }
)
# Words beside a split's word that say nothing more: `training_set`, `Train Images`, `test_data`, `PublicTest`.
_FILLERS = frozenset(
    (
        *(
            "set",
            "sets",
            "data",
            "dataset",
            "datasets",
            "ds",
            "image",
            "images",
            "img",
            "imgs",
            "split",
            "splits",
            "folder",
        ),
        *(
            "dir",
            "file",
            "files",
            "photo",
            "photos",
            "pic",
            "pics",
            "picture",
            "pictures",
            "sample",
            "samples",
            "subset",
        ),
        *("part", "public", "private", "final", "raw", "jpg", "jpeg", "png", "aug", "augmented", "resized", "labelled"),
        *("small", "mini", "large", "big", "full", "new", "old"),
        *("subset", "labeled", "zip"),
    )
)
# Words that mean a side only where every folder beside them means one too: re-identification, short forms.
_WEAK_SPLITS: Mapping[str, str] = MappingProxyType(
    {"tr": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}
    | dict.fromkeys(("query", "queries", "gallery", "probe", "probes", "distractor", "distractors"), "test")
)
# Words for a part of a data set: folders that are called so with a number are no classes.
_PARTS = frozenset(
    (
        *("fold", "folds", "kfold", "split", "splits", "part", "parts", "batch", "chunk", "shard", "subset", "volume"),
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "folder", "dir", "archive"),
        *("data", "dataset", "cv", "partition", "portion", "section", "block", "tr", "te", "va", "query", "gallery"),
    )
)
_SURE_PARTS = frozenset(("fold", "split", "part", "batch", "chunk", "shard", "subset", "partition"))
# Words for where images are from, with a number or a letter beside them: `site_a`, `camera2`.
_PLACES = frozenset(
    (
        *("site", "hospital", "clinic", "center", "centre", "lab", "camera", "cam", "device", "scanner", "sensor"),
        *("user", "subject", "patient", "person", "participant", "annotator", "rater", "team", "client", "worker"),
        *("session", "day", "week", "month", "year", "visit", "run", "trip", "round", "location", "plot", "field"),
        *("farm", "station", "source", "collection", "series", "version", "group", "set", "room", "scene", "domain"),
    )
)
# Words for what was done to images.
_DONE = frozenset(
    (
        *("original", "originals", "augmented", "augmentation", "aug", "raw", "processed", "preprocessed", "cropped"),
        *("resized", "flipped", "rotated", "color", "colour", "rgb", "gray", "grey", "grayscale", "segmented"),
    )
)
# Small copies that programs write beside the images.
_SMALL_COPIES = frozenset(
    ("thumb", "thumbs", "thumbnail", "thumbnails", "_thumbs", "_thumbnails", "thumbs_small", "previews", "preview")
)
_FINGERS = frozenset(("finger", "index", "pinky", "pinkie", "ring", "middle", "palm", "wrist", "fist"))
# Folders without labels, by their whole name.
UNLABELLED_FOLDERS = ("unlabelled", "unlabeled")
_NO_LABELS = frozenset((*UNLABELLED_FOLDERS, "pred", "predict", "prediction", "predictions", "inference", "submission"))
# Folders beside a table: where its images lie, most likely first.
IMAGE_FOLDERS = ("train", "images", "train_images", "image", "imgs", "img", "photos", "data")
# Folders that only hold others, in any language that tools write them in: Google Takeout, exports, downloads.
_HOLDERS = frozenset(
    (
        *(
            *IMAGE_FOLDERS,
            "pictures",
            "pics",
            "dataset",
            "datasets",
            "jpg",
            "jpeg",
            "png",
            "jpegs",
            "raw",
            "files",
            "all",
        ),
        *(
            "files",
            "archive",
            "takeout",
            "google photos",
            "google fotos",
            "google foto",
            "jpegimages",
            "upload",
            "uploads",
        ),
    )
)
_BY_YEAR = re.compile(r"(photos|fotos|foto|foto's|zdjęcia|фото)\b.{0,12}\b(19|20)\d\d", re.I)
_DATE = re.compile(r"(19|20)\d\d([-_. ]?(0?[1-9]|1[0-2])([-_. ]?[0-3]?\d)?)?")
# What systems and programs put beside images: NAS, macOS, Windows, Linux, Lightroom, Capture One, Bridge, ACDSee.
_SYSTEM_FOLDERS = frozenset(
    (
        *(
            "@eadir",
            "lost.dir",
            "#recycle",
            "#snapshot",
            "@tmp",
            "@recycle",
            "@recently-snapshot",
            "@transcode",
            "@__thumb",
        ),
        *(
            "@sharebin",
            "@synoresource",
            "__macosx",
            "$recycle.bin",
            "recycler",
            "recycled",
            "system volume information",
        ),
        *("found.000", "lost+found", "~snapshot", "network trash folder", "temporary items", "__pycache__"),
        *("captureone", "[originals]", "picasa originals", "node_modules", "thumbs.db"),
    )
)
_SYSTEM_ENDS = (".lrdata", ".lrlibrary", ".photoslibrary", ".photolibrary", ".cocatalog", ".aplibrary")
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "zbthumbnail.info"})
_SYNOLOGY_THUMB = re.compile(r"synofile_thumb_|synophoto_thumb_", re.I)
_KNOWN_HIDDEN = re.compile(
    r"\.(git|svn|hg|cache|thumb|trash|ipynb|spotlight|fsevents|temporary|picasa|@|_|apple|bridge|st(folder|versions)"
    r"|dvc|venv|idea|vscode|tmp|ds_|documentrevisions|mobilebackups|nfs|visionloop|dropbox|sync)"
)
MAX_LABEL = 256
# Control characters, halves of characters, ends of lines.
_NO_TEXT = frozenset({"Cc", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # they carry meaning inside words of some scripts, and in emoji
_AROUND = " \t\u00a0'\"`\u00b4\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
_MARKS = re.compile(r"[\s_\u200b-\u200f\u2060\ufeff-]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_WORDS = re.compile(r"[^\W\d_]+(?:'[a-z]+)?")


@lru_cache(maxsize=4096)
def find_side(name: str) -> str | None:
    """Return train, val or test for the name of a split; None for any other name.

    Numbers and words that say nothing more may stand beside it: `Training`, `val2017`, `test1`, `training_set`.
    """
    side, rest = split_name(name)
    return side if all(word in _FILLERS for word in rest) else None


@lru_cache(maxsize=4096)
def split_name(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the side that one word of a name means, and the other words: `seg_train` -> train, (seg,).

    The side is None without such a word, and with words of two sides.
    """
    words = _split_words(name)
    if whole := SPLIT_NAMES.get("".join(words)):  # hold-out, TEST set
        return whole, ()
    sides = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    rest = tuple(word for word in words if word not in SPLIT_NAMES)
    return (sides.pop(), rest) if len(sides) == 1 else (None, rest)


def repeats_name(words: Iterable[str], name: str) -> bool:
    """Say whether words are those of a class's name, in the singular or the plural."""
    own = {word.rstrip("s") for word in _split_words(name)} | _FILLERS
    return all(word in own or word.rstrip("s") in own for word in words)


def find_weak_side(name: str) -> str | None:
    """Return the side of a name that means one only beside other splits: `gallery`, `te`; None for any other name."""
    words = _split_words(name)
    sides = {_WEAK_SPLITS[word] for word in words if word in _WEAK_SPLITS}
    rest = {word for word in words if word not in _WEAK_SPLITS} - _FILLERS - {"multi"}
    return sides.pop() if len(sides) == 1 and not rest else None


def is_part_name(name: str) -> bool:
    """Say whether a name is one of a part of a data set, so that it can be no class: `fold_1`, `images_002`, `tr`."""
    words = [word for word in _split_words(name) if len(word) > 1]
    return bool(_PARTS & {*words}) and all(word in _PARTS or word in _FILLERS for word in words)


def are_parts(names: Collection[str]) -> bool:
    """Say whether all names are those of parts: `fold_1, fold_2`; also `mole_images_part_1, mole_images_part_2`."""
    words = {tuple(word for word in _split_words(name) if len(word) > 1) for name in names}
    are_numbered = len(names) > 1 and len(words) == 1 and bool(_SURE_PARTS & {*next(iter(words))})
    return are_numbered or all(map(is_part_name, names))


def are_groups(names: Collection[str]) -> bool:
    """Say whether all names are those of sites or parts: `siteA, siteB`, `2023, 2024`."""
    return are_parts(names) or all(map(is_group_name, names))


def is_group_name(name: str) -> bool:
    """Say whether a name says where images are from or what was done to them: `siteA`, `2023`, `Augmented Images`."""
    words = _split_words(name)
    long = {word for word in words if len(word) > 1}
    is_numbered = len(long) < len(words) or any(map(str.isdigit, name))
    named = _DONE & long or (is_numbered and _PLACES & long)
    return is_date(name) or is_part_name(name) or (bool(named) and long <= _DONE | _PLACES | _PARTS | _FILLERS)


def is_small_copies(name: str, beside: Iterable[str] = ()) -> bool:
    """Say whether a folder holds small copies by its name: `Thumbs`. A `thumb` beside other fingers is none."""
    return name.strip().lower() in _SMALL_COPIES and not _FINGERS & {w for one in beside for w in _split_words(one)}


def _split_words(name: str) -> list[str]:
    text = unicodedata.normalize("NFC", name).strip()
    return [word.lower() for word in _WORDS.findall(_CAMEL.sub(" ", text))]


def cut_side(name: str) -> str:
    """Return a name without its split's word: `train_tabby_cat` -> tabby_cat."""
    for word in _WORDS.findall(_CAMEL.sub(" ", name)):
        if word.lower() in SPLIT_NAMES:
            return name.replace(word, "", 1).strip(" _-.")
    return name


def has_no_labels(name: str) -> bool:
    """Say whether a folder beside split folders holds images without labels: `unlabelled`, `seg_pred`."""
    words = [word.lower() for word in _WORDS.findall(name)]
    return bool(words) and (words[-1] in _NO_LABELS or words[0] in _NO_LABELS)


def is_unlabelled_name(name: str) -> bool:
    """Say whether a folder beside class folders holds images without labels: `unlabelled`, `Photos from 2023`."""
    return name.strip().lower() in UNLABELLED_FOLDERS or bool(_BY_YEAR.fullmatch(name.strip()))


def is_holder(name: str) -> bool:
    """Say whether a folder's name says that it holds images, and not which."""
    return name.strip().lower() in _HOLDERS


def is_date(name: str) -> bool:
    """Say whether a name is a year, a month or a day."""
    return bool(_DATE.fullmatch(name.strip()))


def is_system_folder(name: str) -> bool:
    """Say whether a folder is one that systems and programs make, or a hidden one."""
    lower = name.lower()
    return name.startswith(".") or lower in _SYSTEM_FOLDERS or lower.endswith(_SYSTEM_ENDS)


def is_known_hidden(name: str) -> bool:
    """Say whether a hidden folder is one that a program makes, so that it can be no class: `.git`, `.thumbnails`."""
    return bool(_KNOWN_HIDDEN.match(name.lower()))


def is_system_file(name: str) -> bool:
    """Say whether a file is one that systems make, or a hidden one."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES or bool(_SYNOLOGY_THUMB.match(name))


def is_passed(path: str) -> bool:
    """Say whether a path is hidden, or a system's own, or lies in such a folder."""
    *folders, name = path.split("/")
    return is_system_file(name) or any(map(is_system_folder, folders))


def is_image_name(name: str) -> bool:
    """Say whether a file's suffix is one of an image, and it is not hidden. Spaces at its end do not matter."""
    return name[name.rfind(".") :].rstrip().lower() in IMAGE_SUFFIXES and not name.startswith(".")


def get_suffix(name: str) -> str:
    """Return what a file of another type is counted as: its suffix in lower case, `hidden`, or `no suffix`."""
    if is_system_file(name):
        return "hidden"
    dot = name.rfind(".")
    return escape_name(name[dot:].lower()[:20]) if 0 < dot < len(name) - 1 else "no suffix"


def is_text(name: str) -> bool:
    """Say whether a name has no control characters. Any script, and any kind of space, is text."""
    return name.isprintable() or not any(unicodedata.category(c) in _NO_TEXT for c in name)


def is_label(text: str) -> bool:
    """Say whether a text can be a class: 1 to 256 characters without control characters, no white space around."""
    return 0 < len(text) <= MAX_LABEL and text == text.strip() and is_text(text)


@lru_cache(maxsize=65536)
def make_label(name: str) -> str:
    """Return a folder's name as a label: in NFC, without what cannot be seen (spaces around it, invisible marks)."""
    if name.isascii() and name.isprintable():
        return name.strip()
    text = unicodedata.normalize("NFC", name)
    text = "".join(c for c in text if c in _JOINERS or unicodedata.category(c) != "Cf")
    return text.strip(_JOINERS + " \t\u00a0\u2007\u202f\u3000").strip()


def escape_name(name: str) -> str:
    """Return a file's name as text of one line that can be stored: what is not printable is escaped."""
    return escape_text(name)


def store_name(name: str) -> str:
    """Return a file's name as it is, for a cell of a table; bytes that are no UTF-8, which no table holds, are escaped.

    `ImageFolder` finds the file by it again.
    """
    return name.encode("utf-8", "backslashreplace").decode()


def find_twins(classes: Iterable[str]) -> list[list[str]]:
    """Return classes that may be one, the cleanest name first.

    Their names differ only by case, kinds of space, marks between words, `.0`, or by quotes, a full stop or what cannot
    be seen around them. Example: ["cat", "Cat", "cat.", '"cat"'], ["1", "01"], ["hot_dog", "hot dog", "hot-dog"].
    """
    alike: dict[str, list[str]] = {}
    for name in sorted(classes, reverse=True):
        text = unicodedata.normalize("NFKC", name).casefold().strip(_AROUND).rstrip(_AROUND + ".,;:")
        text = re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", text)
        text = re.sub(r"^0+(?=[0-9]+$)", "", text)
        alike.setdefault(_MARKS.sub("", text) or name, []).append(name)
    return [sorted(names, key=_count_dirt) for names in alike.values() if len(names) > 1]


def _count_dirt(name: str) -> int:
    """Count what nobody writes on purpose: invisible marks, quotes and full stops around it, odd forms of letters."""
    text = make_label(unicodedata.normalize("NFKC", name))
    clean = text.strip(_AROUND).rstrip(_AROUND + ".,;:")
    return abs(len(name) - len(clean)) + (name != text) + name.endswith(".0")
