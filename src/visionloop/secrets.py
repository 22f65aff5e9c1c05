"""`${NAME}` of params.yaml from the environment, so that no password is in a file, and what must not be shown. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from visionloop.errors import SourceError

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MIN_SECRET = 3  # a shorter one would turn half of every message into ***
_LOGIN = re.compile(r"(?<=//)[^/?#\s]*@")
_QUERY = re.compile(r"(?<=://)([^\s?#'\"]*)\?[^\s'\"]*")


def mask(text: str, secrets: Sequence[str] = ()) -> str:
    """Return text as it may be shown: without these secrets, and without the login and the query of any URL in it.

    Secrets are also found where they were percent-encoded or quoted.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        for form in {secret, quote(secret, safe=""), repr(secret)[1:-1]}:
            text = text.replace(form, "***") if form else text
    return _QUERY.sub(r"\1?...", _LOGIN.sub("***@", text)) if "//" in text else text


@dataclass
class Environment:
    """Expands `${NAME}` and remembers what came out, for masking. `where` names the source in errors."""

    values: Mapping[str, str]
    where: str
    secrets: set[str] = field(default_factory=set)

    def expand(self, text: str) -> str:
        """Replace each `${NAME}` by its value. Raises SourceError, which names the variable that is missing."""
        return _VARIABLE.sub(lambda match: self._look_up(match[1]), text)

    def expand_url(self, text: str) -> str:
        """Replace each `${NAME}` inside a URL, percent-encoded; a text that is one variable is the whole URL."""
        if _VARIABLE.fullmatch(text):
            return self.expand(text)
        return _VARIABLE.sub(lambda match: quote(self._look_up(match[1]), safe=""), text)

    def _look_up(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise SourceError(self.where, f"got ${{{name[:40]}}}", "${NAME} of a variable", "Edit params.yaml.")
        value = self.values.get(name, "")
        if not value:
            found = f"the variable {name} is {'empty' if name in self.values else 'not set'}"
            raise SourceError(self.where, found, "a value in the environment", f"export {name}=...")
        if len(value) >= MIN_SECRET:
            self.secrets.add(value)
        return value
