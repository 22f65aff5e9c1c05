"""Digests of our own code, one a stage: another digest means that the stage's bytes may come out differently.

A stage's digest covers its module and every module of ours that is imported from there, directly or not, except those
of NOT_IN_CODE. Of each module it covers the syntax tree, without comments, layout, docstrings and imports for type
checkers, and without the texts that only people read. Such a text is a string or an f-string that

- is an argument of an exception, of a call that is raised, or of `tell`, `say`, `print`, `warn`, `on_progress`;
- is the value of a name that errors have for their parts: `where`, `found`, `expected`, `todo`, also in capitals;
- is returned by a function `describe_...` that returns a `str`, but not in `evaluation`: that goes into the report.

All other strings count: under another name, or inside another call, an index or a comparison, as they may decide
something ("a" in `tell(load("a"))`). `reason_code` counts, as programs read it.
"""

import ast
import functools
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
    "visionloop.tracking_pages",
    "visionloop.web",
    "visionloop.words",
    "visionloop.workfolder",
    "visionloop.workspace",
    "visionloop.data.contact_sheet",
    "visionloop.data.known_store",
    "visionloop.promotion.evidence",  # the page about a decision
    "visionloop.promotion.ledger",  # who is champion is data, not code
    "visionloop.promotion.report",
    "visionloop.training.mirror",
    "visionloop.training.plots",
    "visionloop.training.run",  # the run in MLflow
    "visionloop.training.views",
    "visionloop.training.watch",
)
_NOT_IN_CODE = tuple(f"{module}." for module in NOT_IN_CODE)
TELLERS = {"tell", "say", "print", "warn", "on_progress"}
EXCEPTIONS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
PARTS = {"where", "found", "expected", "todo"}
Code = tuple[str, list[str]]  # of a module: what counts of its text, and the modules of ours that it imports
WORDING = {"join", "shorten", "mask"}  # calls that do nothing but put words together


def compute_code_digests(package: Path = PACKAGE) -> dict[str, str]:
    """Return one digest a stage, over the source of the package `visionloop` in a folder."""
    known: dict[str, Code | None] = {}
    return {stage: _digest_stage(root, package, known) for stage, root in STAGE_MODULES.items()}


def compute_module_digest(module: str) -> str:
    """Return the digest of one module with all that it imports, as a stage has it."""
    return _digest_stage(module, PACKAGE, {})


def _digest_stage(root: str, package: Path, known: dict[str, Code | None]) -> str:
    """Return the digest of a module with all that it imports; `known` keeps what was read, for other stages."""
    code: dict[str, str] = {}
    waiting, seen = [root], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or _cannot_count(name):
            continue
        seen.add(name)
        if name not in known:
            known[name] = _read_module(name, package)
        if found := known[name]:
            code[name], imported = found
            waiting += imported
    return compute_digest(code)


def _read_module(name: str, package: Path) -> Code | None:
    """Return what counts of a module, and what it imports; None: no module of ours has this name."""
    path = _find_source(name, package)
    if path is None:
        return None
    return _read_code(path.read_text(encoding="utf-8"), keep_descriptions=name.startswith("visionloop.evaluation"))


@functools.lru_cache(maxsize=1024)  # most modules are those of several stages, and a flow asks several times
def _read_code(text: str, *, keep_descriptions: bool) -> Code:
    """Return what counts of a module's text, and the modules of ours that it imports."""
    texts = _Texts(keep_descriptions=keep_descriptions)
    dump = ast.dump(texts.visit(ast.parse(text)))
    dump = dump.replace(", type_params=[]", "")  # a field that Python 3.12 has and 3.11 has not
    return dump, [name for name in texts.imported if name.startswith("visionloop.")]


def _cannot_count(module: str) -> bool:
    return f"{module}.".startswith(_NOT_IN_CODE)


def _find_source(module: str, package: Path) -> Path | None:
    base = package.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


class _Texts(ast.NodeTransformer):
    """Takes out of a tree what only people read, and lists what the rest imports."""

    def __init__(self, *, keep_descriptions: bool) -> None:
        self.imported: list[str] = []
        self._keep_descriptions = keep_descriptions
        self._is_description = False

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        is_docstring = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return ast.Pass() if is_docstring else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST:
        is_for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return ast.Pass() if is_for_types else self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> ast.AST:
        self.imported += [alias.name for alias in node.names]
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if _cannot_count(node.module or ""):
            return ast.Pass()
        if node.module:
            self.imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            _hide_arguments(node.exc)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if _get_name(node) in TELLERS | EXCEPTIONS:
            _hide_arguments(node)
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        names = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else [node.targets[0]]
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        if len(names) == len(values):
            pairs = zip(names, values, strict=True)
            values = [_hide(v) if isinstance(n, ast.Name) and n.id.lower() in PARTS else v for n, v in pairs]
            node.value = ast.Tuple(values, ast.Load()) if len(values) > 1 else values[0]
        return self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if self._is_description and node.value is not None:
            node.value = _hide(node.value)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before = self._is_description
        returns_text = isinstance(node.returns, ast.Name) and node.returns.id == "str"
        is_named_so = node.name.lstrip("_").startswith("describe")
        self._is_description = is_named_so and returns_text and not self._keep_descriptions
        self.generic_visit(node)
        self._is_description = before
        return node


def _get_name(call: ast.Call) -> str:
    return str(getattr(call.func, "id", getattr(call.func, "attr", "")))


def _hide_arguments(call: ast.Call) -> None:
    call.args = [_hide(argument) for argument in call.args]
    for keyword in call.keywords:
        if keyword.arg != "reason_code":
            keyword.value = _hide(keyword.value)


def _hide(value: ast.expr) -> ast.expr:
    """Return an expression without its text: `"a" + b if c else f"{d}"` is `text + b if c else text`."""
    match value:
        case ast.Constant(value=str()) | ast.JoinedStr():
            return ast.Constant("text")
        case ast.BinOp(op=ast.Add()):
            value.left, value.right = _hide(value.left), _hide(value.right)
        case ast.BoolOp():
            value.values = [_hide(each) for each in value.values]
        case ast.IfExp():
            value.body, value.orelse = _hide(value.body), _hide(value.orelse)
        case ast.Call() if _get_name(value) in WORDING:
            _hide_arguments(value)
            if isinstance(value.func, ast.Attribute):  # ", ".join(...)
                value.func.value = _hide(value.func.value)
    return value
