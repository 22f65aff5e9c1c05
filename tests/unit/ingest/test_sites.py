"""Folders that are sites, years, folds or parts of a data set, and not classes; and small copies beside classes."""

import pytest
from test_layout import read, sides_of

from visionloop.errors import SourceError
from visionloop.ingest.paths.names import find_twins, is_group_name, is_part_name

CATS_DOGS = {"cats", "dogs"}


@pytest.mark.parametrize(
    ("layout", "labels"),
    [
        ("{Original~Images/Original~Images,Augmented~Images/Augmented~Images}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("{Original,Augmented}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("{color,grayscale,segmented}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("{siteA/siteA,siteB/siteB}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("{siteA/siteA,siteB}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("{hospital_1/x/y,hospital_2}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("data/{siteA,siteB}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("2023/{cats,dogs,birds}/1.jpg 2024/{cats,dogs}/1.jpg", {"cats", "dogs", "birds"}),
        ("2022/{cats,dogs}/1.jpg 2023/{dogs,birds}/1.jpg 2024/{cats,birds}/1.jpg", {"cats", "dogs", "birds"}),
        ("siteA/{cats,dogs}/1.jpg siteB/cats/1.jpg", CATS_DOGS),
        ("{2023-01,2023-02}/{camera1,camera2}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("{fold_1,fold_2,fold_3}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("{split1,split2}/{cats,dogs}/1.jpg", CATS_DOGS),
        ("part1/cats/1.jpg part1/dogs/1.jpg part2/cats/2.jpg", CATS_DOGS),
        ("part1/{cats,dogs}/1.jpg part2/{cows,pigs}/1.jpg", {"cats", "dogs", "cows", "pigs"}),
        ("{query,gallery}/{cats,dogs}/1.jpg", CATS_DOGS),
    ],
)
def test_folders_inside_sites_and_parts_are_the_classes(layout: str, labels: set[str]) -> None:
    told: list[str] = []
    found = read(layout, told)
    assert {place[0] for place in found.values()} == labels
    assert all(isinstance(place, tuple) for place in found.values()), "none is left out"
    assert [line for line in told if " are taken for groups, and the folders in them for the classes: " in line]


def test_class_folders_of_two_sites_that_differ_in_case_are_told() -> None:
    told: list[str] = []
    assert {place[0] for place in read("siteA/{Cats,dogs}/1.jpg siteB/{cats,dogs}/1.jpg", told).values()} == {
        "Cats",
        "cats",
        "dogs",
    }
    assert "siteA, siteB are taken for groups" in told[0]
    assert told[1].endswith("classes that may be one: Cats, cats; `label_map` joins them, best to 'cats'")


def test_sites_in_split_folders_keep_the_side() -> None:
    assert sides_of("train/{siteA,siteB}/{cats,dogs}/1.jpg test/{siteC,siteD}/{cats,dogs}/1.jpg") == {
        "cats": {None, "test"},
        "dogs": {None, "test"},
    }


@pytest.mark.parametrize(
    "layout",
    [
        "{berlin,paris}/{cats,dogs}/1.jpg",
        "{berlin/berlin,paris}/{cats,dogs}/1.jpg",
        "berlin/{cats,dogs,cows}/1.jpg paris/{Cats,Dogs}/1.jpg",
        "berlin/{cats,dogs}/1.jpg paris/{dogs,cows}/1.jpg rome/{cats,cows}/1.jpg",
        "{berlin,paris}/{cats,dogs}/{1,2,3,4,5,6}.jpg berlin/preview.jpg",
        "{berlin,paris}/{cats,dogs}/{1,2,3,4,5,6}.jpg misc/1.jpg",
        "{siteA,siteB}/{cats,dogs}/1.jpg extra/1.jpg",
        "siteA/{cats,dogs}/1.jpg siteB/1.jpg",
        "{Original,Augmented}/cats/1.jpg",
        "2023/{italy,spain}/1.jpg 2024/{france,peru}/1.jpg",
    ],
)
def test_names_that_do_not_say_what_they_are_are_asked_about(layout: str) -> None:
    with pytest.raises(SourceError, match=r"can be read in two ways: .* hold the folders "):
        read(layout)


@pytest.mark.parametrize(
    ("layout", "labels"),
    [
        ("{cat,dog}/{site1,site2}/1.jpg", {"cat", "dog"}),
        ("{cat,dog}/{part1,part2}/1.jpg", {"cat", "dog"}),
        ("{cat,dog}/{2020,2021}/1.jpg", {"cat", "dog"}),
        ("{cat,dog}/images/1.jpg", {"cat", "dog"}),
        ("animal/{cat,dog}/1.jpg vehicle/{car,bus}/1.jpg", {"animal", "vehicle"}),
        ("{cat,dog}/1.jpg {cat,dog}/{wild,tame}/2.jpg", {"cat", "dog"}),
        ("{field,room}/1.jpg", {"field", "room"}),
        ("{new,old}/1.jpg", {"new", "old"}),
        ("{cat,part1}/1.jpg", {"cat", "part1"}),
        ("{en,tr,de}/1.jpg", {"en", "tr", "de"}),
        ("{gallery,museum}/1.jpg", {"gallery", "museum"}),
        ("{color,shape}/1.jpg", {"color", "shape"}),
    ],
)
def test_classes_stay_classes(layout: str, labels: set[str]) -> None:
    assert {place[0] for place in read(layout).values()} == labels


@pytest.mark.parametrize(
    ("layout", "folders"),
    [
        ("{query,gallery}/{1,2}.jpg", "gallery/, query/"),
        ("{query,gallery,bounding_box_train}/{1,2}.jpg", "bounding_box_train/, gallery/, query/"),
        ("{fold_1,fold_2,fold_3}/{1,2}.jpg", "fold_1/, fold_2/, fold_3/"),
        ("{Fold~1,Fold~2}/images/{1,2}.jpg", "Fold 1/, Fold 2/"),
        ("{train,test-dev}/{1,2}.jpg", "test-dev/, train/"),
        ("{tr,te}/{1,2}.jpg", "te/, tr/"),
        ("{train,test}/{fold_1,fold_2}/1.jpg", "test/, train/"),
        ("{train,valid,test,fold_1}/{1,2}.jpg", "fold_1/, test/, train/, valid/"),
        ("{train,test,images}/{1,2}.jpg", "images/, test/, train/"),
        ("x/{split1,split2}/{1,2}.jpg", "x/split1/, x/split2/"),
        ("{part1,part2}/{1,2}.jpg", "part1/, part2/"),
        ("{images_001,images_002}/{1,2}.jpg", "images_001/, images_002/"),
        ("{moles_part_1,moles_part_2}/{1,2}.jpg", "moles_part_1/, moles_part_2/"),
    ],
)
def test_flat_parts_hold_no_labels(layout: str, folders: str) -> None:
    with pytest.raises(SourceError, match="no image in any class folder") as caught:
        read(layout)
    assert f"there are no labels in {folders}; expected" in str(caught.value)
    assert "`--table FILE`" in str(caught.value)
    assert "`--pattern '" in str(caught.value)
    assert " `--unlabelled " in str(caught.value)


def test_names_of_parts_still_give_their_pattern() -> None:
    assert {place[0] for place in read("{fold_1,fold_2}/{cat,dog}.{0,1}.jpg").values()} == {"cat", "dog"}


def test_everything_unlabelled_is_an_answer() -> None:
    assert set(read("{fold_1,fold_2}/{1,2}.jpg", unlabelled=["fold_1", "fold_2"]).values()) == {("", None)}


SIDES = {"train", "val", "test"}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("{tr,va,te}/{cat,dog}/1.jpg", {"cat": SIDES, "dog": SIDES}),
        ("{train,minival,test-dev}/{cat,dog}/1.jpg", {"cat": SIDES, "dog": SIDES}),
        ("{train,query,gallery}/{cat,dog}/1.jpg", {"cat": {None, "test"}, "dog": {None, "test"}}),
        ("{cat,dog}/images/{train,test}/1.jpg", {"cat": {None, "test"}, "dog": {None, "test"}}),
        ("cat/a/b/{train,test}/1.jpg dog/{train,test}/1.jpg", {"cat": {None, "test"}, "dog": {None, "test"}}),
        ("cat/{cat_train,cat_test}/1.jpg dog/{dog_train,dog_test}/1.jpg", {n: {None, "test"} for n in ("cat", "dog")}),
        ("cats/{train_cat,test_cat}/1.jpg dogs/train_dog/1.jpg", {"cats": {None, "test"}, "dogs": {None}}),
        ("x/cat/Cat~{Train,Test}/1.jpg x/dog/Dog~{Train,Test}/1.jpg", {n: {None, "test"} for n in ("cat", "dog")}),
        ("{fold_1,fold_2}/{cat,dog}/{train,test}/1.jpg", {"cat": {None, "test"}, "dog": {None, "test"}}),
        ("{train,test}/a/b/{cat,dog}/1.jpg", {"cat": {None, "test"}, "dog": {None, "test"}}),
        ("train/a/b/c/{cat,dog}/1.jpg test/{cat,dog}/1.jpg", {"cat": {None, "test"}, "dog": {None, "test"}}),
        ("{train,test}/images/x/y/{cat,dog}/1.jpg", {"cat": {None, "test"}, "dog": {None, "test"}}),
    ],
)  # fmt: skip
def test_sides_behind_other_folders(layout: str, expected: dict[str, set[str | None]]) -> None:
    assert sides_of(layout) == expected


def test_a_lone_class_in_a_split_folder_is_one() -> None:
    assert sides_of("train/cat/x/1.jpg test/cat/x/1.jpg") == {"cat": {None, "test"}}


@pytest.mark.parametrize(
    ("layout", "kept", "options"),
    [
        ("{cat,dog,Thumbs,Thumbnails,thumb}/1.jpg", {"cat", "dog"}, {}),
        ("{cat,dog}/1.jpg {cat,dog}/{thumbs,_thumbs}/1.jpg", {"cat", "dog"}, {}),
        ("{train,test}/{cat,dog}/1.jpg previews/1.jpg", {"cat", "dog"}, {}),
        ("{train,test}/{1,2}.jpg thumbs/1.jpg", {"train", "test"}, {"pattern": "{label}/"}),
        ("{thumb,index~finger,pinky}/1.jpg", {"thumb", "index finger", "pinky"}, {}),
        ("thumbs/{cat,dog}/1.jpg", {"cat", "dog"}, {}),
        ("{thumbs,previews}/1.jpg", {"thumbs", "previews"}, {}),
        ("{cat,thumbs_up}/1.jpg", {"cat", "thumbs_up"}, {}),
        ("{x,thumbs}/{cat,dog}/1.jpg", {"cat", "dog"}, {"pattern": "thumbs/{label}/"}),
    ],
)
def test_folders_of_small_copies_are_passed_over_unless_nothing_else_is_there(
    layout: str, kept: set[str], options: dict[str, object]
) -> None:
    told: list[str] = []
    found = read(layout, told, **options)
    assert {place[0] for place in found.values() if isinstance(place, tuple)} == kept
    passed = sorted(path for path, place in found.items() if place is None)
    said = [line for line in told if "folders of small copies are passed over: " in line]
    assert bool(passed) == bool(said)
    assert all(path.split("/")[-2] in " ".join(said) for path in passed)


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "Cat"),
        ("cat", "cat."),
        ("cat", '"cat"'),
        ("cat", "'cat'"),
        ("cat", "\u201ccat\u201d"),
        ("cat", "cat\u200b"),
        ("cat", "\ufeffcat"),
        ("cat", "cat\u00a0"),
        ("cat", "cat,"),
        ("Cat", "\uff23at"),
        ("1", "1.0"),
        ("hot dog", "hot  dog."),
    ],
)
def test_twins_go_to_the_clean_name(names: tuple[str, str]) -> None:
    assert find_twins(names) == find_twins(names[::-1]) == [[*names]]


def test_what_names_say() -> None:
    assert [
        name for name in ("fold1", "Part_2", "batch-03", "images (2)", "cat1", "big", "new") if is_part_name(name)
    ] == [
        "fold1",
        "Part_2",
        "batch-03",
        "images (2)",
    ]
    assert [
        name for name in ("2023", "siteA", "site", "Camera 3", "berlin", "raw", "class1") if is_group_name(name)
    ] == [
        "2023",
        "siteA",
        "Camera 3",
        "raw",
    ]
