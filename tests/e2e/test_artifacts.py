"""Two workspaces that report to one Prefect server: each has an artifact of its own, with one title and its links."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from shapes import ROOT, ask_prefect, run

# A flow that ends as a retrain does: two workspaces of one name, one of another; the first reports twice.
REPORT = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, "flows")
from prefect import flow
from retrain import finish
from visionloop.store import LocalStore
from visionloop.words import Summary

def report(home, name, headline):
    commands = {"read the report": f"{home}/reports/report.html", "compare runs": f"cd {home} && visionloop ui"}
    settings = SimpleNamespace(home=Path(home), reports_dir=Path(home))
    place = SimpleNamespace(name=name, settings=settings, store=LocalStore(Path(sys.argv[1])))
    return flow(name="report")(lambda: finish(Summary(name, "promoted", headline, commands=commands), place))()

report("/srv/a", "pets", "pets has a new champion")
report("/srv/b", "pets", "pets has a new champion")
report("/srv/c", "cars", "nothing changed")
report("/srv/a", "pets", "the candidate was refused")
"""


def test_artifacts_of_workspaces_are_kept_apart(prefect_api: str, tmp_path: Path) -> None:
    done = run(
        ROOT, sys.executable, "-c", REPORT, str(tmp_path), PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [
        artifact
        for name in ("pets", "cars")
        for artifact in ask_prefect(
            prefect_api, "artifacts/filter", {"artifacts": {"key": {"like_": f"retrain-{name}-%"}}}
        )
        if "/srv/" in json.dumps(artifact)
    ]
    homes: dict[str, set[str]] = {}
    for artifact in found:
        (home,) = {*re.findall(r"/srv/.", artifact["data"] + artifact["description"])}
        homes.setdefault(artifact["key"], set()).add(home)
    assert sorted(map(sorted, homes.values())) == [["/srv/a"], ["/srv/b"], ["/srv/c"]]
    titles = sorted(artifact["data"].splitlines()[0] for artifact in found)
    assert titles == [
        "# cars: nothing changed",
        "# pets has a new champion",
        "# pets has a new champion",
        "# pets: the candidate was refused",
    ]
    assert all("- to read the report: `/srv/" in artifact["data"] for artifact in found)
    assert all("- to compare runs: `cd /srv/" in artifact["data"] for artifact in found)
