"""What no file of the repository may hold, and how long files and functions may be."""

import ast
import re
import subprocess
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
PYTHON_FOLDERS = ("src", "flows", "benchmarks", "tests")

# Spelled in parts, so that this file passes its own test.
INDEX_HOSTS = (
    "pypi" + ".org",
    "python" + "hosted",
    "download.py" + "torch",
    "/simple" + "/",
    "index" + "-url =",
    "deb" + ".debian",
)
HOMES = "|".join(("home", "root", "Users", "work", "opt" + "/pypi"))
ABSOLUTE_PATH = re.compile(rf"""(?:(?<=["'\s(=:`])|^|file://)/(?:{HOMES})/[\w.-]""", re.M)


def list_files() -> list[Path]:
    """Every file that git has or would take, except those that are deleted."""
    call = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(call, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in sorted(set(names)) if name and (ROOT / name).is_file()]


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def list_python_files() -> list[Path]:
    return [path for folder in PYTHON_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_names_a_package_index() -> None:
    found = [path.relative_to(ROOT) for path in list_files() if any(host in read_text(path) for host in INDEX_HOSTS)]
    assert found == []


def test_no_file_holds_an_absolute_path_of_a_machine() -> None:
    found = {}
    for path in list_files():
        text = read_text(path)
        hits = [hit.group() for hit in ABSOLUTE_PATH.finditer(text)]
        hits += [place for place in (str(ROOT), str(Path.home())) if len(place) > 5 and place in text]
        if hits:
            found[str(path.relative_to(ROOT))] = hits
    assert found == {}


@pytest.mark.parametrize("text", ["cd /ho" + "me/me/x", "path = '/ro" + "ot/data'", "file:///wo" + "rk/a"])
def test_absolute_path_is_found_when_there_is_one(text: str) -> None:
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize("text", [".visionloop/work/train", "{root}/work/a", "https://x.test/home/a", "a/root/b"])
def test_absolute_path_is_not_found_in_relative_ones(text: str) -> None:
    assert not ABSOLUTE_PATH.search(text)


def test_mlflow_folder_holds_no_python() -> None:
    # With an __init__.py the folder would shadow the package of the same name.
    assert [path.name for path in (ROOT / "mlflow").rglob("*.py")] == []
    assert not (ROOT / "datasets").exists()


def test_flows_know_nothing_of_the_command_line() -> None:
    assert [path.name for path in (ROOT / "flows").glob("*.py") if "visionloop.cli" in read_text(path)] == []


def find_rings(imports: dict[str, set[str]]) -> dict[str, list[str]]:
    """Return the modules that import each other in a ring, or stand between two, each with those that it imports."""
    left = {name: imported & imports.keys() for name, imported in imports.items()}
    while True:
        needed = set().union(*left.values())
        rest = {name: imported & left.keys() for name, imported in left.items() if imported and name in needed}
        if rest == left:
            return {name: sorted(imported) for name, imported in left.items()}
        left = rest


def test_a_ring_of_imports_is_found() -> None:
    assert find_rings({"a": {"b"}, "b": {"c", "json"}, "c": {"b", "d"}, "d": set()}) == {"b": ["c"], "c": ["b"]}
    assert find_rings({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {}


def test_no_modules_import_each_other_not_even_within_functions() -> None:
    graph = grimp.build_graph("visionloop", exclude_type_checking_imports=True, cache_dir=None)
    assert len(graph.modules) > 300
    assert find_rings({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}) == {}


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(read_text(path).splitlines()) for path in list_python_files()}
    assert len(lengths) > 15
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in list_python_files():
        for node in ast.walk(ast.parse(read_text(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_every_module_says_what_it_is_for() -> None:
    modules = [path for path in list_python_files() if ROOT / "tests" not in path.parents and path.stat().st_size]
    silent = [path for path in modules if not ast.get_docstring(ast.parse(read_text(path)))]
    assert [str(path.relative_to(ROOT)) for path in silent] == []


def test_lock_has_hashes_and_the_dependencies_of_the_project() -> None:
    import tomllib

    lock = read_text(ROOT / "requirements.lock")
    project = tomllib.loads(read_text(ROOT / "pyproject.toml"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[<>=!~\[ ;]", line)[0].lower().replace("_", "-") for line in wanted}
    locked = re.findall(r"^([a-z0-9-]+)(?:\[\S+\])?==", lock, flags=re.M)
    assert names - set(locked) == set()
    blocks = re.split(r"^(?=[a-z0-9-]+(?:\[\S+\])?==)", lock, flags=re.M)[1:]
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []
    assert "lightning" not in locked, "releases of it were malicious: pytorch-lightning only"
