"""Tell what an image holds, as a bill of materials (CycloneDX 1.5, JSON), from within it:

    docker run --rm --interactive IMAGE python - <infra/docker/sbom.py >sbom.json

Debian's packages and those of Python, with versions and licences. No time, no serial number: it is the same each time.
Needs the standard library alone.
"""

import json
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

STATUS = Path("/var/lib/dpkg/status")
RELEASE = Path("/etc/os-release")


def list_python_packages() -> Iterator[dict[str, Any]]:
    for found in distributions():
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        yield make_component(f"pkg:pypi/{name}@{found.version}", name, found.version, read_license(found))


def read_license(found: Distribution) -> list[dict[str, Any]]:
    if expression := found.metadata.get("License-Expression"):
        return [{"expression": expression}]
    text = (found.metadata.get("License") or "").strip()
    return [{"license": {"name": text}}] if text and "\n" not in text else []


def list_system_packages() -> Iterator[dict[str, Any]]:
    system = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', RELEASE.read_text(), flags=re.M)) if RELEASE.exists() else {}
    for entry in STATUS.read_text().split("\n\n") if STATUS.exists() else ():
        fields = dict(re.findall(r"^(\w+): (.*)$", entry, flags=re.M))
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"].replace("+", "%2B")
            purl = f"pkg:deb/{system.get('ID', 'debian')}/{name}@{version}?arch={fields['Architecture']}"
            yield make_component(purl, name, fields["Version"], [])


def make_component(purl: str, name: str, version: str, licenses: list[dict[str, Any]]) -> dict[str, Any]:
    kept = {"licenses": licenses} if licenses else {}
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, **kept}


if __name__ == "__main__":
    components = {one["purl"]: one for one in [*list_python_packages(), *list_system_packages()]}
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1}
    print(json.dumps({**bom, "components": [components[purl] for purl in sorted(components)]}, indent=1))
