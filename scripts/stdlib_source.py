"""The Python standard library's source: its files, their functions, and what makes two functions the same."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Third-party code, tables of numbers, and files that describe the machine Python was built on.
NOT_CORPUS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload", "ensurepip"}
NOT_CORPUS_PREFIXES = ("_sysconfigdata", "config-")
BODY_CHARS = 45

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Source:
    """One file of the library: its text and all its functions, nested ones and methods included."""

    path: str
    text: str
    functions: list[tuple[FunctionNode, str, bool]] = field(default_factory=list)


def fraction(key: str) -> float:
    """A number in [0, 1) that depends on nothing but `key`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def collapse(text: str) -> str:
    """`text` with every run of whitespace made one space."""
    return " ".join(text.split())


def library_root() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_sources(root: Path | None = None) -> list[Source]:
    """The parsable Python files of the standard library, sorted by path."""
    root = root or library_root()
    sources = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if NOT_CORPUS & set(relative.parts) or relative.parts[0].startswith(NOT_CORPUS_PREFIXES):
            continue
        try:
            with tokenize.open(path) as stream:
                text = stream.read()
            with warnings.catch_warnings(action="ignore"):  # about invalid escapes in the files read
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # the test suite holds files that are wrong on purpose
        if is_table(text):
            continue
        sources.append(Source(relative.as_posix(), text, list(walk_functions(tree))))
    return sources


def is_table(text: str) -> bool:
    """Whether a file is mostly data: fewer than 45 letters in 100 characters that are not blanks."""
    dense = "".join(text.split())
    return len(dense) > 2000 and sum(c.isalpha() for c in dense) < 0.45 * len(dense)


def walk_functions(
    node: ast.AST, prefix: str = "", inside_function: bool = False
) -> Iterator[tuple[FunctionNode, str, bool]]:
    """Every function under `node` as (node, qualified name, whether it is nested in another function)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            yield child, name, inside_function
            yield from walk_functions(child, f"{name}.", True)
        elif isinstance(child, ast.ClassDef):
            yield from walk_functions(child, f"{prefix}{child.name}.", inside_function)
        else:
            yield from walk_functions(child, prefix, inside_function)


def span(node: FunctionNode) -> tuple[int, int]:
    """First and last line of a function, decorators included, counted from 1."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return first, node.end_lineno or node.lineno


def docstring_key(node: FunctionNode) -> str:
    """What two docstrings must share to count as the same; empty without a docstring."""
    return collapse(ast.get_docstring(node) or "").lower()


def body_statements(node: FunctionNode) -> list[ast.stmt]:
    """The function's statements after its docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def body_key(node: FunctionNode) -> str:
    """What two bodies must share to count as the same, whatever their functions' names; empty for a short body."""
    text = "\n".join(ast.unparse(statement) for statement in body_statements(node))
    return text if len(text) >= BODY_CHARS else ""
