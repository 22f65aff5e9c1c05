"""YAML as dvc reads it (1.2): `on`, `off`, `yes` and `no` are words. In YAML 1.1 `train.on` would be `train.true`."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """The safe loader, for which only true and false are truths."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith(":bool") or first in "tTfF"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)
