"""Digests of our own code, one a stage: another digest means that the stage's bytes may come out differently.

A stage's digest covers its module and every module of ours that is imported from there, directly or not, except those
of NOT_IN_CODE. Of each module it covers the syntax tree: no comment, no layout, no docstring, no import for type
checkers alone, and no text that only people read. A string or f-string is such a text if it stands

- in a `raise` or an `assert`, in a function that returns an exception, or in the arguments of an exception of ours, of
  such a function, or of `tell`, `say`, `print`, `warn` or `on_progress`; `reason_code=` counts, as programs read it;
- in what is assigned to a name, or in a function named `describe...`, that is used in such places alone.

The argument of another call there counts all the same, as that may do anything with it: "a" in `tell(load("a"))`. An
f-string is left out whole, with what stands in its braces. All else counts: names, numbers, calls.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from visionloop import errors
from visionloop.records import compute_digest

PACKAGE = Path(__file__).parent
STAGE_MODULES = {
    "prepare": "visionloop.data.prepare",
    "embed": "visionloop.features.embed",
    "train": "visionloop.training.fit",
    "evaluate": "visionloop.evaluation.evaluate",
    "gate": "visionloop.promotion.decide",
}
# What these do, and all that is imported by them alone, cannot change a result. A module that does both is not here.
NOT_IN_CODE = (
    "visionloop.code_digests",
    "visionloop.errors",
    "visionloop.lifetime",  # who dies with whom
    "visionloop.parallel",  # where work is done; its answers come in the order of the questions
    "visionloop.params.ingest",  # what is ingested is in the pin
    "visionloop.pipeline",
    "visionloop.secrets",
    "visionloop.settings",
    "visionloop.store",  # bytes under the digest that they have
    "visionloop.tracking",
    "visionloop.web",
    "visionloop.words",
    "visionloop.workfolder",
    "visionloop.workspace",
    "visionloop.data.contact_sheet",
    "visionloop.promotion.ledger",  # who is champion is data, not code
    "visionloop.training.mirror",
    "visionloop.training.plots",
    "visionloop.training.run",  # the run in MLflow
    "visionloop.training.views",
    "visionloop.training.watch",
)
TELLERS = {"tell", "say", "print", "warn", "on_progress"}
EXCEPTIONS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
ALWAYS = "always"  # the condition of a text that stands in a message itself
WORDING = {"join", "shorten", "mask"}  # calls that do nothing but put words together
_SKIPPED_FIELDS = {"kind", "type_comment", "type_ignores", "type_params"}  # the last is new in Python 3.12


@dataclass(frozen=True)
class _Text:
    """A string, or the parts of an f-string, left out if any of the conditions holds: names of code that is message."""

    parts: tuple[object, ...]
    conditions: frozenset[str]


@dataclass
class _Module:
    """What was read of one module: its imports, and its tree as a list of words and texts.

    `named` are the names whose value, or body, is text if they are used in messages alone. `uses` are all uses of any
    name, each with its conditions. `exceptional` functions return an exception, `ordinary` ones do not.
    """

    imports: list[str] = field(default_factory=list)
    words: list[object] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    exceptional: set[str] = field(default_factory=set)
    ordinary: set[str] = field(default_factory=set)
    uses: list[tuple[str, frozenset[str]]] = field(default_factory=list)


def compute_code_digests(package: Path = PACKAGE) -> dict[str, str]:
    """Return one digest a stage, over the source of the package `visionloop` in a folder."""
    modules: dict[str, _Module] = {}
    reached = {stage: sorted(_reach(root, package, modules)) for stage, root in STAGE_MODULES.items()}
    messages = _find_messages(modules.values())
    digests = {name: _digest(module.words, messages) for name, module in modules.items()}
    return {stage: compute_digest({name: digests[name] for name in names}) for stage, names in reached.items()}


def _reach(root: str, package: Path, modules: dict[str, _Module]) -> set[str]:
    """Return the modules that are imported from one, directly or not; read those that nobody has read yet."""
    found: set[str] = set()
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in found or _cannot_count(name):
            continue
        if name not in modules:
            path = _find_source(name, package)
            if path is None:
                continue
            modules[name] = _Reader(name).read(path.read_text(encoding="utf-8"))
        found.add(name)
        waiting += modules[name].imports
    return found


def _cannot_count(module: str) -> bool:
    return any(module == other or module.startswith(f"{other}.") for other in NOT_IN_CODE)


def _find_source(module: str, package: Path) -> Path | None:
    base = package.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _find_messages(modules: Iterable[_Module]) -> frozenset[str]:
    """Return the conditions that hold: names that are used in messages alone, and calls that make exceptions."""
    read = list(modules)
    makers = set().union(*(m.exceptional for m in read)) - set().union(*(m.ordinary for m in read))
    fixed = {ALWAYS, *(f"call {name}" for name in (*makers, *TELLERS, *EXCEPTIONS))}
    uses = [use for module in read for use in module.uses]
    named = set().union(*(m.named for m in read)) & {name for name, _ in uses}
    while True:
        holding = fixed | named
        elsewhere = {name for name, conditions in uses if name in named and not conditions & holding}
        if not elsewhere:
            return frozenset(holding)
        named -= elsewhere


def _digest(words: list[object], messages: frozenset[str]) -> str:
    hasher = hashlib.sha256()
    for word in _resolve(words, messages):
        hasher.update(word.encode())
        hasher.update(b"\0")
    return hasher.hexdigest()


def _resolve(words: Iterable[object], messages: frozenset[str]) -> Iterator[str]:
    for word in words:
        if not isinstance(word, _Text):
            yield str(word)
        elif word.conditions & messages:
            yield "text"
        else:
            yield from _resolve(word.parts, messages)


class _Reader(ast.NodeVisitor):
    """Walks over the tree of one module. Strings where it is are texts if one of `_conditions` holds."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._function = ""  # the outermost function or method around
        self._in_class = False
        self._in_text = False
        self._raised: ast.expr | None = None
        self._conditions: frozenset[str] = frozenset()
        self.module = _Module()

    def read(self, source: str) -> _Module:
        self.visit(ast.parse(source))
        return self.module

    def generic_visit(self, node: ast.AST, *, but: str = "") -> None:
        """Add the words of a node, in the order of its fields; empty ones add none."""
        words = self.module.words
        words.append(type(node).__name__)
        for name, value in ast.iter_fields(node):
            if value is None or value == [] or name in _SKIPPED_FIELDS or name == but:
                continue
            words.append(name)
            for each in value if isinstance(value, list) else [value]:
                self.visit(each) if isinstance(each, ast.AST) else words.append(repr(each))
        words.append("end")

    def _visit_under(self, node: ast.AST, conditions: frozenset[str]) -> None:
        before, self._conditions = self._conditions, conditions
        self.visit(node)
        self._conditions = before

    def visit_Expr(self, node: ast.Expr) -> None:
        if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):  # a docstring
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        word = repr(node.value)
        is_text = isinstance(node.value, str) and self._conditions
        self.module.words.append(_Text((word,), self._conditions) if is_text else word)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        words, was_in_text = self.module.words, self._in_text
        self.module.words, self._in_text = [], bool(self._conditions)
        self.generic_visit(node)
        parts, self.module.words, self._in_text = self.module.words, words, was_in_text
        words.append(_Text(tuple(parts), self._conditions))

    def visit_Raise(self, node: ast.Raise) -> None:
        self._raised = node.exc
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.generic_visit(node, but="msg")

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        around = self._conditions if self._in_text or name in WORDING else frozenset()
        inside = around | ({ALWAYS} if node is self._raised else {f"call {name.removeprefix('_')}", f"call {name}"})
        self.module.words.append("Call")
        self.visit(node.func)
        for argument in node.args:
            self._visit_under(argument, inside)
        for keyword in node.keywords:
            self.module.words.append(str(keyword.arg))
            self._visit_under(keyword.value, frozenset() if keyword.arg == "reason_code" else inside)
        self.module.words.append("end")

    def visit_Name(self, node: ast.Name) -> None:
        self.module.words.append(node.id)
        if isinstance(node.ctx, ast.Load):
            self.module.uses += [(key, self._conditions) for key in (node.id, self._name_local(node.id))]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.module.uses.append((node.attr, self._conditions))

    def _name_local(self, name: str) -> str:
        return f"{self._name}:{self._function}:{name}"

    def visit_Assign(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        """Walk over an assignment: what gets a name, of a function or of the module, is text if the name is for it."""
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        pairs: list[tuple[ast.expr, ast.expr | None]] = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=False))
        if self._in_class or not all(isinstance(each, ast.Name) for each, _ in pairs):
            self.generic_visit(node)
            return
        self.generic_visit(node, but="value")
        for name, value in pairs:
            assert isinstance(name, ast.Name)
            key = self._name_local(name.id) if self._function else name.id
            self.module.named.add(key)
            if value is not None:
                self._visit_under(value, self._conditions | {key})

    visit_AnnAssign = visit_AugAssign = visit_Assign

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before = self._function, self._in_class, self._conditions
        returns = ast.unparse(node.returns) if node.returns else ""
        makes_error = returns.endswith("Error") or returns in EXCEPTIONS or returns in {"Exception", "NoReturn"}
        (self.module.exceptional if makes_error else self.module.ordinary).add(node.name)
        if makes_error:
            self._conditions |= {ALWAYS}
        if node.name.lstrip("_").startswith("describe"):
            self.module.named.add(node.name)
            self._conditions |= {node.name}
        self._function, self._in_class = self._function or f"{node.name}@{node.lineno}", False
        self.generic_visit(node)
        self._function, self._in_class, self._conditions = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._in_class = self._in_class, True
        self.generic_visit(node)
        self._in_class = before

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.module.imports += [alias.name for alias in node.names if alias.name.startswith("visionloop.")]
        self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        self.module.imports += [name for name in names if name.startswith("visionloop.")]
        if not _cannot_count(names[0]):
            self.generic_visit(node)
