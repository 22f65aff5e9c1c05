"""The shapes in which tools write labels as one JSON value, turned into rows. Pure.

[{"file": "1.jpg", "label": "cat"}, ...]              rows as they are; also below the one key that holds a list
{"1.jpg": "cat"}, {"1.jpg": {"label": "cat"}}         a key for each image
{"cat": ["1.jpg", "2.jpg"], "dog": ["3.jpg"]}         a list of images for each class
{"train": ROWS, "test": ROWS}                         any of these for each side
{"images": [], "annotations": [], "categories": []}   COCO: the classes of an image are those of its annotations
[{"data": {"image": ...}, "annotations": [...]}]      Label Studio: the choices of all annotators
{"1.jpg123": {"filename": "1.jpg", "regions": []}}    VIA: the attributes of the file, or else those of its regions
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from visionloop.errors import SourceError, shorten
from visionloop.ingest.paths.listing import find_side, is_image_name

Object = Mapping[str, Any]


def find_rows(value: object, where: str, tell: Callable[[str], None]) -> Sequence[object]:
    """Return the rows of a JSON value; what is no object among them is for the caller to refuse.

    Raises:
        SourceError: it has the shape of no table, or of one without labels.
    """
    if isinstance(value, list):
        return _read_label_studio(value) if _is_label_studio(value) else value
    if not isinstance(value, dict):
        raise SourceError(where, f"holds a {name_kind(value)}", "a list of objects", "Check the file.")
    if isinstance(value.get("images"), list) and isinstance(value.get("annotations"), list):
        return _read_coco(value, where, tell)
    if via := _find_via(value):
        tell(f"{where}: VIA (VGG Image Annotator): the labels are attributes of the files, or else of their regions")
        return _read_via(via)
    return _find_plain_rows(value, where, tell)


def _find_plain_rows(value: Object, where: str, tell: Callable[[str], None]) -> Sequence[object]:
    """Return the rows of an object that no tool of its own wrote. Raises SourceError."""
    if value and all(_is_image_key(key) for key in value):
        return [_make_row(key, one) for key, one in value.items()]
    sides = {key: part for key, part in value.items() if find_side(key) and isinstance(part, list | dict) and part}
    if sides and all(key in sides or not isinstance(part, list | dict) for key, part in value.items()):
        tell(f"{where}: rows taken from {', '.join(sides)}, as the column split")
        parts = {key: find_rows(part, f"{where} {key}", tell) for key, part in sides.items()}
        if any(isinstance(row, str) for rows in parts.values() for row in rows):
            found, todo = "lists images for each side, but not their labels", "Write file and label of each image."
            raise SourceError(where, found, "a label for each image", todo)
        return [{"split": key, **row} if isinstance(row, dict) else row for key, rows in parts.items() for row in rows]
    if any(value.values()) and all(isinstance(v, list) and all(map(_is_image_key, v)) for v in value.values()):
        return [{"file": name, "label": label} for label, names in value.items() for name in names]
    lists = {key: part for key, part in value.items() if isinstance(part, list) and part}
    if len(lists) != 1:
        found = f"is an object with {len(lists)} lists: {shorten([key[:40] for key in lists]) or 'none'}"
        expected = 'a list of objects, an object that holds one, {"a.jpg": "cat"}, or COCO'
        raise SourceError(where, found, expected, "Save it as JSON lines: one object with file and label on each line.")
    key, rows = lists.popitem()
    tell(f"{where}: rows taken from {key[:80]!r}")
    return find_rows(rows, where, tell)


def name_kind(value: object) -> str:
    """Return what JSON calls a value."""
    names = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


def _is_image_key(key: object) -> bool:
    return isinstance(key, str) and is_image_name(key.replace("\\", "/").rsplit("/", 1)[-1])


def _make_row(file: str, about: object) -> Object:
    return {"file": file, **about} if isinstance(about, dict) else {"file": file, "label": about}


def _read_coco(value: Object, where: str, tell: Callable[[str], None]) -> Sequence[object]:
    """Return a row for each image: its own keys and `label`, the names of its annotations' categories, each once."""
    categories = value.get("categories")
    names = {
        one.get("id"): one.get("name", one.get("id"))
        for one in (categories if isinstance(categories, list) else ())
        if isinstance(one, dict)
    }
    labels: dict[object, list[object]] = defaultdict(list)
    annotations = [one for one in value["annotations"] if isinstance(one, dict)]
    for one in annotations:
        category = one.get("category_id")
        name = names.get(category, category) if isinstance(category, int | str) else None
        image = one.get("image_id")
        if name is not None and isinstance(image, int | str) and name not in labels[image]:
            labels[image].append(name)
    if annotations and not any(labels.values()):
        found = "is COCO whose annotations have no category_id (captions or key points)"
        raise SourceError(where, found, "annotations with a class", "Write a CSV with file and label.")
    tell(f"{where}: COCO: the classes of an image are those of its annotations")
    return [
        {**one, "label": labels.get(one.get("id")) if isinstance(one.get("id"), int | str) else None}
        if isinstance(one, dict)
        else one
        for one in value["images"]
    ]


def _is_label_studio(rows: Sequence[object]) -> bool:
    first = rows[0] if rows else None
    return (
        isinstance(first, dict)
        and isinstance(first.get("data"), dict)
        and isinstance(first.get("annotations", first.get("completions")), list)
    )


def _read_label_studio(tasks: Sequence[object]) -> Sequence[object]:
    """Return a row for each task: its data, and what its annotators chose, each once; skipped answers do not count."""
    rows: list[tuple[Object, dict[str, list[object]]]] = []
    for task in tasks:
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            return tasks
        chosen: dict[str, list[object]] = {}
        for answer in task.get("annotations", task.get("completions")) or ():
            if isinstance(answer, dict) and not answer.get("was_cancelled"):
                _add_choices(chosen, answer.get("result"))
        rows.append((task["data"], chosen))
    questions = {name for _, chosen in rows for name in chosen}
    if len(questions) <= 1:  # one question: its answer is the label
        return [{**data, "label": next(iter(chosen.values()), None)} for data, chosen in rows]
    return [{**data, **chosen} for data, chosen in rows]


def _add_choices(chosen: dict[str, list[object]], results: object) -> None:
    for result in results if isinstance(results, list) else ():
        if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
            continue
        values = result["value"].get(str(result.get("type")))
        mine = chosen.setdefault(str(result.get("from_name", "label")), [])
        mine += [one for one in (values if isinstance(values, list) else ()) if one not in mine]


def _find_via(value: Object) -> Sequence[Object]:
    """Return the files of an export or a project of VIA (VGG Image Annotator); () when it is none."""
    project = value.get("_via_img_metadata")
    files = [*(project if isinstance(project, dict) else value).values()]
    is_via = all(isinstance(one, dict) and "filename" in one and "regions" in one for one in files)
    return [one for one in files if isinstance(one, dict)] if is_via else ()


def _read_via(files: Sequence[Object]) -> Sequence[object]:
    """Return a row for each file. Of one attribute the values are the label; several are columns of their own."""
    rows: list[tuple[Object, dict[str, list[object]]]] = []
    for one in files:
        regions = one["regions"].values() if isinstance(one["regions"], dict) else one["regions"] or ()
        own = _list_attributes([one.get("file_attributes")])
        of_regions = [region.get("region_attributes") for region in regions if isinstance(region, dict)]
        rows.append((one, own or _list_attributes(of_regions)))
    names = {name for _, chosen in rows for name in chosen}
    if len(names) <= 1:
        return [{"file": one["filename"], "label": next(iter(chosen.values()), None)} for one, chosen in rows]
    return [{"file": one["filename"], **chosen} for one, chosen in rows]


def _list_attributes(attributes: Sequence[object]) -> dict[str, list[object]]:
    """Return the values of attributes by name, each once: a text, or what was ticked."""
    chosen: dict[str, list[object]] = {}
    for one in attributes:
        for name, value in one.items() if isinstance(one, dict) else ():
            ticked = [key for key, is_on in value.items() if is_on] if isinstance(value, dict) else [value]
            mine = chosen.setdefault(str(name), [])
            mine += [each for each in ticked if each not in ("", None) and each not in mine]
    return {name: values for name, values in chosen.items() if values}
