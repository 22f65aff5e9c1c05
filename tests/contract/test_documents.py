"""README, .env.example and Makefile against the commands, the targets and the environment that exist."""

import contextlib
import io
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from fakes import COMMANDS, run_here
from visionloop.settings import QUIET_TOOLS, tool_environment

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
INFRA_PAGES = sorted((ROOT / "infra").rglob("*.md"))
PROSE = {"keeps", "has"}  # `visionloop keeps` at the start of a line is a sentence


@cache
def read_help(*command: str) -> str:
    """What `visionloop COMMAND --help` prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setenv("COLUMNS", "200")
        assert run_here(patch, *command, "--help") == 0
    return shown.getvalue()


def read_code(*folders: str) -> str:
    """All Python source below some folders of the repository."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(files))


def read_examples(fence: str) -> str:
    """The code blocks of README.md with this fence."""
    return "\n".join(re.findall(rf"^```{fence}\n(.*?)^```", README, flags=re.M | re.S))


def test_commands_are_the_agreed_ones() -> None:
    listed = read_help().split("From photos to a model:")[1]
    assert sorted(re.findall(r"^ {2}([a-z][a-z-]*)", listed, flags=re.M)) == sorted(COMMANDS)


def test_without_a_command_the_first_hour_is_told() -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        assert run_here(patch) == 0
    named = re.findall(r"^  visionloop ([a-z]+)", shown.getvalue(), flags=re.M)
    assert named == ["start", "predict", "serve", "suspects", "doctor"]
    assert "visionloop --help" in shown.getvalue()


def test_readme_names_only_commands_that_exist() -> None:
    # `visionloop X` in code spans and blocks; prose says `visionloop keeps`, without the backtick.
    named = set(re.findall(r"(?:^|`|&& |\| )visionloop ([a-z][a-z-]*)", README, flags=re.M)) - {"keeps"}
    assert named <= set(COMMANDS)
    assert named == set(COMMANDS), "a command that README.md does not tell of"


@pytest.mark.parametrize("page", [*PAGES, *INFRA_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_use_only_commands_and_options_that_exist(page: Path) -> None:
    """`visionloop X --option` in code spans and blocks; X may have a second word (`keys new`)."""
    text, missing = page.read_text(encoding="utf-8"), []
    for command, rest in re.findall(r"(?:^|`|&& )visionloop ([a-z][a-z-]*)((?: [^`\n]*)?)", text, flags=re.M):
        if command not in COMMANDS:
            missing += [] if command in PROSE else [command]
            continue
        second = re.match(r" ([a-z]+)\b", rest)
        has_second = second and re.search(rf"^ {{2}}{second[1]} ", read_help(command), flags=re.M)
        shown = read_help(command, second[1]) if second and has_second else read_help(command)
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest.split("#")[0])
        missing += [f"{command} {option}" for option in options if option not in shown]
    assert missing == []


def test_the_site_of_the_pages_is_built_and_asks_no_other_site(tmp_path: Path) -> None:
    """Strict: a link, an anchor or a page of the menu that is not there fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in PAGES[1:]}
    built = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.html")}
    assert pages == built - {Path("404.html")}
    loaded = re.compile(r"""<(?:script|img|link|iframe)[^>]+(?:src|href)=["']?(?:https?:)?//""")
    assert [str(path) for path in built if loaded.search((tmp_path / path).read_text(encoding="utf-8"))] == []


def test_readme_names_only_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M))
    kept = {
        "install",
        "demo",
        "demo-loop",
        "test",
        "test-long",
        "check",
        "fix",
        "lock",
        "docs",
        "bench",
        "clean",
        "env-team",
        "up-team",
        "down-team",
        "logs-team",
        "sbom",
        "help",
    }
    assert kept == targets
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.M)) <= targets


def test_readme_and_contributing_name_only_files_that_exist() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", README + GUIDE)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    tree = re.findall(
        r"^ *((?:src/visionloop|flows|tests|benchmarks)/[\w./-]*|\w+\.(?:md|yaml|toml|lock))  ", GUIDE, re.M
    )
    assert len(tree) > 10
    assert [name for name in tree if not (ROOT / name).exists()] == []


def test_readme_has_blocks_for_the_end_to_end_test() -> None:
    assert "make demo" in read_examples("bash")


def test_env_example_lists_every_variable_that_is_read() -> None:
    code = read_code("src", "flows")
    read = set(re.findall(r"""(?:env(?:iron)?\.get\(|env(?:iron)?\[|getenv\()["']([A-Z][A-Z0-9_]+)["']""", code))
    read |= set(tool_environment(ROOT))
    assert {"VISIONLOOP_STORE", "VISIONLOOP_HOME", "MLFLOW_TRACKING_URI"} <= read
    listed = read_env_example()
    assert sorted(read - set(listed) - SET_BY_US_ONLY - SET_BY_OTHERS) == []


def test_env_example_lists_no_variable_that_nobody_reads() -> None:
    known = read_code("src", "flows")
    by_tools = {"PREFECT_API_URL"}
    assert [name for name in read_env_example() if name not in by_tools and name not in known] == []


def test_env_example_has_the_values_of_the_settings() -> None:
    listed = read_env_example()
    assert {name: listed[name] for name in QUIET_TOOLS} == QUIET_TOOLS
    active = [line for line in (ROOT / ".env.example").read_text().splitlines() if line and line[0] != "#"]
    assert {line.partition("=")[0] for line in active} == set(QUIET_TOOLS), (
        "what is set without editing changes nothing"
    )


def test_makefile_opts_out_of_telemetry_like_the_settings() -> None:
    exported = dict(re.findall(r"^export (\w+) = (\S+)$", (ROOT / "Makefile").read_text(), flags=re.M))
    assert exported == {name: QUIET_TOOLS[name] for name in exported}
    assert {"DO_NOT_TRACK", "ORT_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY", "DVC_NO_ANALYTICS"} <= set(exported)


def test_continuous_integration_runs_what_people_run() -> None:
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "exec make test"
    assert os.access(script, os.X_OK)


# Variables of the system, and those that one visionloop process sets for its children.
SET_BY_US_ONLY = {"DVC_STAGE", "PATH", "VISIONLOOP_GUARDIAN", "VISIONLOOP_TOOLS"} | {
    "GLOO_SOCKET_IFNAME",
    "RAY_CHDIR_TO_TRIAL_DIR",
}
# What torchrun tells its processes, and what every terminal and every OpenMP program has.
SET_BY_OTHERS = {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} | {
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_RUN_ID",
    "OMP_NUM_THREADS",
    "TERM",
}


def read_env_example() -> dict[str, str]:
    """Every variable of .env.example, also the commented ones, with its value."""
    text = (ROOT / ".env.example").read_text()
    return dict(re.findall(r"^#?([A-Z][A-Z0-9_]+)=(.*)$", text, flags=re.M))
