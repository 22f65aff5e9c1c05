"""Which file of a folder is its table, and whether a folder is read by a table or by its class folders. Pure."""

from collections.abc import Callable, Sequence

from visionloop.errors import SourceError, shorten
from visionloop.ingest.paths.names import IMAGE_FOLDERS, UNLABELLED_FOLDERS, find_side
from visionloop.ingest.tables.rows import guess_table_kind

# Which of several tables in a folder is the one, by its name without suffix.
TABLE_NAMES = ("labels", "train_labels", "metadata", "annotations", "train")
IGNORED = ("sample_submission", "samplesubmission", "submission")


def list_tables(names: Sequence[str]) -> list[str]:
    """Return the names of tables among the files of a folder, sorted; hidden ones and submissions left out."""
    return sorted(name for name in names if guess_table_kind(name) and not name.lower().startswith((".", *IGNORED)))


def is_read_by_table(names: Sequence[str], class_folders: Sequence[str]) -> bool:
    """Say whether images are labelled by a table beside them: there is one, and there are no class folders.

    `names` are the files of the folder, `class_folders` the folders with images: those in it, below split folders too.
    """
    no_classes = (*IMAGE_FOLDERS, *UNLABELLED_FOLDERS)
    classes = [name for name in class_folders if name.lower() not in no_classes and not find_side(name)]
    return bool(list_tables(names)) and len(classes) < 2


def choose_table(names: Sequence[str], where: str, tell: Callable[[str], None]) -> str:
    """Return which of these files is the table. Raises SourceError when none or several could be."""
    tables = list_tables(names)
    for wanted in TABLE_NAMES if len(tables) > 1 else ():
        chosen = [name for name in tables if name.rsplit(".", 1)[0].lower() == wanted]
        if len(chosen) == 1:
            tell(f"{where}: of {len(tables)} tables {chosen[0]} is taken")
            return chosen[0]
    if len(tables) != 1:
        found = f"holds {len(tables)} tables: {shorten(tables)}" if tables else "holds no table"
        raise SourceError(where, found, "one, or one named labels.csv", "Give the path of the table itself.")
    return tables[0]
