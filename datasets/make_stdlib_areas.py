"""Make `stdlib_areas.csv`: functions of the Python standard library, and the area of the library they belong to.

    python datasets/make_stdlib_areas.py            the shipped rows
    python datasets/make_stdlib_areas.py --all OUT  every row there is, for benchmarks/encoder_lora.py

A table with text, category and number columns. The same Python gives the same bytes: every choice is made by a hash.
"""

from __future__ import annotations

import argparse
import ast
import csv
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "scripts"))

from stdlib_source import (  # noqa: E402
    FunctionNode,
    Source,
    body_key,
    body_statements,
    collapse,
    fraction,
    library_sources,
    span,
)

COLUMNS = ["code", "kind", "lines", "parameters", "area", "split"]
TRAIN, VALIDATION, TEST = 0, 1, 2
PYTHON = (3, 12)
SHIPPED = 1800
CODE_CHARS = 110

# Modules by area; the tests of a module belong to it, so `socket` is socket.py and test/test_socket.py.
AREAS = {
    "archives": "bz2 gzip lzma shutil tarfile zipfile zlib",
    "asyncio": "asyncio",
    "concurrency": "_test_multiprocessing concurrent concurrent_futures multiprocessing queue subprocess threading "
    "thread threading_local _test_concurrent_futures",
    "email": "email imaplib mailbox poplib smtplib smtpd mimetypes",
    "gui": "idlelib tkinter ttk turtle turtledemo",
    "imports": "import importlib modulefinder pkgutil runpy zipimport",
    "network": "asyncore docxmlrpc ftplib http httplib httpservers ipaddress socket socketserver ssl urllib urllib2 "
    "urllib2_localnet urllib2net urllibnet urlparse wsgiref xmlrpc",
    "numbers": "_pydecimal cmath complex decimal float fractions int int_literal long math random statistics",
    "testing": "doctest pydoc unittest",
    "time": "_pydatetime calendar datetime datetimetester strptime time zoneinfo _strptime",
    "types": "_collections_abc abc collections dataclasses descr enum inspect types typing",
    "xml": "html htmlparser minidom pulldom pyexpat sax xml xml_etree xml_etree_c",
}
AREA_OF = {module: area for area, modules in AREAS.items() for module in modules.split()}


def area_of(path: str) -> str | None:
    """The area of a file of the library, by the module it is part of or tests; None where it is in none."""
    parts = [part.removesuffix(".py") for part in path.split("/")]
    if parts[0] == "test":
        parts = parts[1:]
    return AREA_OF.get(parts[0].removeprefix("test_")) if parts else None


def kind_of(node: FunctionNode, qualname: str) -> str:
    """What sort of function it is, by its head alone."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if decorators & {"property", "classmethod", "staticmethod"}:
        return sorted(decorators & {"property", "classmethod", "staticmethod"})[0]
    if isinstance(node, ast.AsyncFunctionDef):
        return "coroutine"
    return "method" if "." in qualname else "function"


def code_of(node: FunctionNode) -> str:
    """The function's statements without its docstring, as `ast.unparse` writes them, on one line."""
    return collapse("\n".join(ast.unparse(statement) for statement in body_statements(node)))


def shortened(code: str) -> str:
    """The start of a function's code, to the last whole word."""
    return code if len(code) <= CODE_CHARS else code[: CODE_CHARS + 1].rsplit(" ", 1)[0]


def row_of(source: Source, node: FunctionNode, qualname: str) -> dict[str, Any]:
    """The function as a row, without its split."""
    arguments = node.args
    first, last = span(node)
    return {
        "code": shortened(code_of(node)),
        "kind": kind_of(node, qualname),
        "lines": last - first + 1,
        "parameters": len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]),
        "area": area_of(source.path),
        "key": f"{source.path}:{qualname}",
    }


def all_rows(sources: list[Source]) -> list[dict[str, Any]]:
    """Every function of an area as a row, in the order of a hash; of rows with one code only one is taken.

    60 in 100 rows go to train, 8 to validation, 32 to test; by a hash of the function's name alone.
    """
    rows = [
        row_of(source, node, qualname)
        for source in sources
        if area_of(source.path) is not None
        for node, qualname, nested in source.functions
        if not nested and body_key(node)
    ]
    seen: set[str] = set()
    kept = []
    for row in sorted(rows, key=lambda row: fraction(row["key"])):
        if row["code"].lower() not in seen and len(row["code"].split()) >= 3:
            seen.add(row["code"].lower())
            place = fraction("split " + row["key"])
            kept.append(row | {"split": TRAIN if place < 0.6 else VALIDATION if place < 0.68 else TEST})
    return kept


def main() -> None:
    """Write the CSV and print the number of rows of each split."""
    parser = argparse.ArgumentParser(description="Make the table of areas from the running Python's library.")
    parser.add_argument("--out", type=Path, default=HERE / "stdlib_areas.csv")
    parser.add_argument("--all", action="store_true", help="every row there is, not only those that are shipped")
    args = parser.parse_args()
    if sys.version_info[:2] != PYTHON:
        print(f"warning: the shipped file is made with Python 3.12, this is {platform.python_version()}; rows differ")
    rows = all_rows(library_sources())
    rows = rows if args.all else rows[:SHIPPED]
    with args.out.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    counts = Counter(row["split"] for row in rows)
    print(
        f"{args.out.name}: {len(rows)} rows, {args.out.stat().st_size} bytes; train {counts[TRAIN]}, "
        f"validation {counts[VALIDATION]}, test {counts[TEST]}"
    )
    print(", ".join(f"{area} {count}" for area, count in Counter(row["area"] for row in rows).most_common()))


if __name__ == "__main__":
    main()
