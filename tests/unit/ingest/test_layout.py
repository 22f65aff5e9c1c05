"""How folders are read: splits, classes, what lies around them; what can be read in two ways is asked about.

A layout is written with braces, as in a shell: `{train,test}/{cat,dog}/1.jpg` are four files.
"""

import re

import pytest

from visionloop.errors import SourceError
from visionloop.ingest.paths.layout import Placement, place_all


def expand(text: str) -> list[str]:
    if found := re.search(r"\{([^{}]*)\}", text):
        return [
            one for part in found[1].split(",") for one in expand(text[: found.start()] + part + text[found.end() :])
        ]
    return [text]


def read(layout: str, told: list[str] | None = None, **options: object) -> dict[str, tuple[str, str | None] | str]:
    """Return label and side of each path ("" without a label), or the reason against it."""
    paths = sorted(path for part in layout.split(" ") for path in expand(part.replace("~", " ")))
    tell = told.append if told is not None else lambda line: None
    places = place_all(paths, "source x", tell, **options)  # type: ignore[arg-type]
    return {
        path: ((place.labels or ("",))[0], place.side) if isinstance(place, Placement) else place
        for path, place in zip(paths, places, strict=True)
    }


def sides_of(layout: str, **options: object) -> dict[str, set[str | None]]:
    """Return the labels and the sides in which each occurs."""
    sides: dict[str, set[str | None]] = {}
    for place in read(layout, **options).values():
        assert isinstance(place, tuple), place
        sides.setdefault(place[0], set()).add(place[1])
    return sides


TRAIN_TEST = {"cat": {None, "test"}, "dog": {None, "test"}}
ALL_THREE = {name: {"train", "val", "test"} for name in ("cat", "dog")}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("{training_set,test_set}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{training_set/training_set,test_set/test_set}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{seg_train/seg_train,seg_test/seg_test}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{seg_train,seg_test}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{Train,Test}~Data/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{TRAIN,TEST}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{trainset,testset}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{trainval,tests}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{Xtrain,Xtest}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{train_small,TEST_NEW}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{Trainingsdaten,Testdaten}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{apprentissage,essai}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{TrainImages,TestImages}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{pets_train,pets-test}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{01_train,02_test}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{训练集,测试集}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{train,hold-out}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{train2017,val2017}/{cat,dog}/1.jpg", TRAIN_TEST),
        ("{train,valid,test}/{cat,dog}/1.jpg", ALL_THREE),
        ("images/{train,dev,eval}/{cat,dog}/1.jpg", ALL_THREE),
        ("pets/pets/{train,val,test}/{cat,dog}/1.jpg", ALL_THREE),
        ("{train,val,test}/images/{cat,dog}/1.jpg", ALL_THREE),
        ("x/{train,val,test}/{cat,dog}/1.jpg x/x/{train,val,test}/{cat,dog}/2.jpg", ALL_THREE),
        ("{train,val,test}_{cat,dog}/1.jpg", ALL_THREE),
        ("{cat,dog}_{train,val,test}/1.jpg", ALL_THREE),
        ("{cat,dog}/{train,val,test}/1.jpg", ALL_THREE),
        ("pets/{cat,dog}/{Training,Validation,Testing}/1.jpg", ALL_THREE),
        ("train/train_{cat,dog}/1.jpg test/test_{cat,dog}/1.jpg", TRAIN_TEST),
        ("{train,test}{A,B}/1.jpg", {"A": {None, "test"}, "B": {None, "test"}}),
    ],
)
def test_split_words_are_sides_and_never_classes(layout: str, expected: dict[str, set[str | None]]) -> None:
    assert sides_of(layout) == expected


@pytest.mark.parametrize(
    ("layout", "labels"),
    [
        ("photos/{cat,dog}/1.jpg", {"cat", "dog"}),
        ("a/b/c/{cat,dog}/1.jpg", {"cat", "dog"}),
        ("Takeout/Google~Photos/{cat,dog}/1.jpg", {"cat", "dog"}),
        ("pets/{cat,dog}/1.jpg preview.jpg", {"cat", "dog"}),
        ("{bus,car,train}/1.jpg", {"bus", "car", "train"}),
        ("{cat,dog,dev}/1.jpg", {"cat", "dog", "dev"}),
        ("{valid,invalid}/1.jpg", {"valid", "invalid"}),
        ("{cat,dog}/{2020,2021-06}/1.jpg", {"cat", "dog"}),
        ("cat/{2020,2021}/1.jpg", {"cat"}),
        ("{cat,dog}/images/1.jpg", {"cat", "dog"}),
        ("{cat/indoor,dog/outdoor}/1.jpg", {"cat", "dog"}),
        ("{0,1,2}/1.jpg", {"0", "1", "2"}),
        ("{train~station,bus~stop}/1.jpg", {"train station", "bus stop"}),
    ],
)
def test_classes(layout: str, labels: set[str]) -> None:
    found = read(layout)
    assert {place[0] for place in found.values() if isinstance(place, tuple)} == labels
    assert {place[1] for place in found.values() if isinstance(place, tuple)} == {None}


def test_a_lone_folder_in_a_split_folder_is_passed_through_and_told() -> None:
    told: list[str] = []
    found = read("train/train/{cat,dog}.{0,1}.jpg test1/test1/1.jpg", told)
    assert found["train/train/cat.0.jpg"] == ("cat", None)
    assert found["test1/test1/1.jpg"] == ("", None), "without labels: for prediction only"
    assert told == [
        "source x: all of test1/ is inside test1/, so this name is not taken for a class",
        "source x: all of train/ is inside train/, so this name is not taken for a class",
        "source x: no class folders, labels guessed from names by the pattern {label}.{number}.*",
        "source x: images of test1/ without labels, for prediction only: 1",
    ]


@pytest.mark.parametrize(
    ("layout", "unlabelled"),
    [
        ("{seg_train/seg_train,seg_test/seg_test}/{cat,dog}/1.jpg seg_pred/seg_pred/1.jpg", "seg_pred/seg_pred/1.jpg"),
        ("{train,val}/{cat,dog}/1.jpg test/1.jpg", "test/1.jpg"),
        ("train/{cat,dog}/1.jpg test/unknown/1.jpg", "test/unknown/1.jpg"),
        ("{cat,dog,unlabelled}/1.jpg", "unlabelled/1.jpg"),
        ("Takeout/Google~Photos/{cat,dog}/1.jpg Takeout/Google~Photos/Photos~from~2023/1.jpg", "2023/1.jpg"),
    ],
)
def test_folders_without_labels_are_for_prediction_only(layout: str, unlabelled: str) -> None:
    found = read(layout)
    assert [path for path, place in found.items() if place[0] == ""] == [p for p in found if p.endswith(unlabelled)]
    assert {place[0] for place in found.values()} == {"", "cat", "dog"}


@pytest.mark.parametrize(
    ("layout", "answers"),
    [
        ("{cat,dog,test}/1.jpg", ({"pattern": "{label}/"}, {"unlabelled": ["test"]})),
        ("{test,control}/1.jpg", ({"pattern": "{label}/"}, {"unlabelled": ["test"]})),
        ("pets/{cat,dog,test}/1.jpg", ({"pattern": "*/{label}/"}, {"unlabelled": ["pets/test"]})),
        ("{train,test}/{a,b}/{cat,dog}/1.jpg", ({"pattern": "{side}/{label}/"}, {"pattern": "{side}/*/{label}/"})),
        (
            "{train,test}/{train,test}/{cat,dog}/1.jpg test/test/cow/1.jpg",
            ({"pattern": "{side}/*/{label}/"}, {"pattern": "*/{side}/{label}/"}),
        ),
        ("{berlin,paris}/{cat,dog}/1.jpg", ({"pattern": "{label}/"}, {"pattern": "*/{label}/"})),
        ("{train,extra}/{cat,dog}/1.jpg", ({"pattern": "{side}/{label}/"}, {"pattern": "{label}/"})),
        ("{bus,car}/1.jpg train/{steam,diesel}/1.jpg", ({"pattern": "{label}/"}, {"pattern": "{side}/{label}/"})),
        (
            "{fold1,fold2}/{train,test}/{cat,dog}/1.jpg",
            ({"pattern": "*/{side}/{label}/"}, {"pattern": "{label}/{side}/"}),
        ),
    ],
)
def test_what_can_be_read_in_two_ways_is_asked_about_and_both_answers_work(
    layout: str, answers: tuple[dict[str, object], dict[str, object]]
) -> None:
    with pytest.raises(SourceError, match="can be read in two ways: ") as caught:
        read(layout)
    read_so = []
    for answer in answers:
        ((key, value),) = answer.items()
        shown = value[0] if isinstance(value, list) else value
        assert f"--{key} {shown}" in str(caught.value).replace("'", "")
        read_so.append([place for place in read(layout, **answer).values() if isinstance(place, tuple)])
    assert read_so[0] != read_so[1]


@pytest.mark.parametrize(
    "layout",
    [
        "{train,valid,test}/{1,2}.jpg",
        "images/{train,val}/{1,2}.jpg",
        "{train,test}/images/{1,2}.jpg",
        "{seg_train,seg_test}/1.jpg",
        "{train_1,train_2,test_1}/1.jpg",
        "images/{1,2}.jpg",
    ],
)
def test_splits_alone_hold_no_labels(layout: str) -> None:
    with pytest.raises(SourceError, match="no image in any class folder"):
        read(layout)


def test_a_pattern_of_folders_takes_the_first_ones() -> None:
    found = read("{train,seg_test,extra}/{cat,dog}/deep/1.jpg loose.jpg", pattern="{side}/{label}/")
    assert found["train/cat/deep/1.jpg"] == ("cat", None)
    assert found["seg_test/dog/deep/1.jpg"] == ("dog", "test")
    assert found["extra/cat/deep/1.jpg"] == ("cat", None)
    assert found["loose.jpg"] == "its name does not fit the pattern {side}/{label}/"


def test_names_are_text_in_nfc_without_what_cannot_be_seen() -> None:
    told: list[str] = []
    found = read(
        "cafe\u0301/1.jpg caf\u00e9/2.jpg cat~/1.jpg \u200bdog\ufeff/1.jpg Cat/1.jpg "
        "\u0645\u06cc\u200c\u0634\u0648\u062f/1.jpg",
        told,
    )
    labels = {place[0] for place in found.values()}
    assert labels == {"caf\u00e9", "cat", "Cat", "dog", "\u0645\u06cc\u200c\u0634\u0648\u062f"}, (
        "a joiner inside a word is part of it"
    )
    assert told == [
        "source x: classes that may be one: Cat, cat; `label_map` joins them, best to 'cat'",
        "source x: folder names with invisible characters or in another form, taken without:"
        " '\\u200bdog\\ufeff', 'cafe\\u0301', 'cat '",
    ]


def test_one_name_with_a_control_character_costs_its_images_only() -> None:
    found = read("cat/1.jpg dog/1.jpg bad\x07/1.jpg")
    assert found["bad\x07/1.jpg"] == "the name of its folder cannot be a class"
