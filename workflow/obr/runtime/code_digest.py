"""A digest of a stage's code, so that Snakemake sees what it cannot see itself: a changed import."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "obr"
ROOT = Path(__file__).parents[1]
COMPILED = (".cpp", ".h", ".cu")


def digest(stage: str) -> str:
    """Hash of the module `obr.<stage>` and of every module of the package that it imports, however indirectly, and of
    what they compile.

    Comments, docstrings and layout of Python do not count: the syntax trees are hashed without them.
    """
    found = hashlib.sha256()
    for path in sorted(closure(stage)):
        found.update(f"{path}\n{_tree(path)}\n".encode())
        for source in compiled(path):
            found.update(f"{source.name}\n{source.read_text(encoding='utf-8')}\n".encode())
    return found.hexdigest()[:16]


def compiled(path: str) -> list[Path]:
    """Sources in C++ that a module brings: those of its name, or, of a package, all in its folder."""
    module = ROOT / path
    found = module.parent.iterdir() if module.name == "__init__.py" else module.parent.glob(f"{module.stem}.*")
    return sorted(source for source in found if source.suffix in COMPILED)


def closure(stage: str) -> set[str]:
    """Modules, as paths below the package, that `obr.<stage>` consists of."""
    seen: set[str] = set()
    todo = [_path(f"{PACKAGE}.{stage}")]
    while todo:
        path = todo.pop()
        if path is None or path in seen:
            continue
        seen.add(path)
        todo += [_path(name) for name in _imports(path)]
    return seen


def _path(module: str) -> str | None:
    """The file of a module of the package, below ROOT; None for names that are not modules."""
    parts = module.split(".")[1:]
    for candidate in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
        if parts and candidate.is_file():
            return candidate.relative_to(ROOT).as_posix()
    return None


@cache
def _imports(path: str) -> list[str]:
    """Modules of the package, and names in them, that a file imports; walked once, since stages share most files."""
    names = []
    for node in _executed(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [a.name for a in node.names if a.name.split(".")[0] == PACKAGE]
    return names


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those below `if TYPE_CHECKING`."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield from _executed(node)


@cache
def _tree(path: str) -> str:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body.pop(0)
    return ast.dump(tree)
