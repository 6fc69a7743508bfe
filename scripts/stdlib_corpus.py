"""The Python standard library as training text, and the one definition of which functions are kept out of it.

`datasets/make_stdlib_instructions.py` turns the functions that `held_out_functions` returns into the shipped
dataset; `scripts/train_base_model.py` trains the shipped base model on what `build_corpus` leaves. Both therefore
agree on the boundary: no docstring and no body of a dataset row is in the base model's training text.

    python scripts/stdlib_corpus.py --out corpus.json.gz
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from stdlib_source import (
    FunctionNode,
    Source,
    body_key,
    body_statements,
    collapse,
    docstring_key,
    fraction,
    library_sources,
    span,
)

# In the training text, but not a place to take instructions from.
NOT_DATASET = {"test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3"}
DECORATORS = {"property", "classmethod", "staticmethod"}

CANDIDATES = 2100  # of these, the few whose text also occurs elsewhere in the library are dropped
INSTRUCTION_CHARS = (30, 320)
OUTPUT_CHARS = (70, 640)
HELDOUT_FILES_PERCENT = 4
WINDOW = 6  # words that must match before a text is compared in full


@dataclass(frozen=True)
class Function:
    """One function of the library: where it is, what makes it the same as another, and its dataset row."""

    file: str
    qualname: str
    docstring_key: str
    body_key: str
    instruction: str
    signature: str
    output: str
    body_text: str

    @property
    def key(self) -> str:
        """The name that every hash-based choice about this function is made with."""
        return f"{self.file}:{self.qualname}"


def instruction_of(docstring: str) -> str:
    """The docstring as one line, cut to its first paragraph where it is long or goes on with examples."""
    whole = collapse(docstring)
    if len(whole) <= INSTRUCTION_CHARS[1] and ">>>" not in whole:
        return whole
    return collapse(docstring.split("\n\n")[0])


def reads_as_instruction(text: str) -> bool:
    """Whether a one-line docstring describes a job, rather than naming a signature or pointing elsewhere."""
    return (
        INSTRUCTION_CHARS[0] <= len(text) <= INSTRUCTION_CHARS[1]
        and len(text.split()) >= 5
        and text[0].isalpha()
        and text[0].isupper()
        and ">>>" not in text
        and "->" not in text.split(".")[0]
        and re.match(r"(See|Same as|Ditto|Like|Internal|XXX|TODO|Deprecated)\b", text) is None
        and re.match(r"\S+\(", text) is None
    )


def candidate(source: Source, node: FunctionNode, qualname: str) -> Function | None:
    """The function as a possible dataset row, or None where it would make a poor one."""
    docstring = ast.get_docstring(node)
    if docstring is None or isinstance(node, ast.AsyncFunctionDef):
        return None
    if any(ast.unparse(decorator) not in DECORATORS for decorator in node.decorator_list):
        return None
    statements = body_statements(node)
    instruction = instruction_of(docstring)
    if not statements or not reads_as_instruction(instruction) or not body_key(node):
        return None
    bare = ast.FunctionDef(node.name, node.args, statements, node.decorator_list, node.returns, None)
    output = ast.unparse(ast.fix_missing_locations(bare))
    if not OUTPUT_CHARS[0] <= len(output) <= OUTPUT_CHARS[1]:
        return None
    lines = source.text.split("\n")  # not splitlines: form feeds are no line ends to ast
    body_text = collapse("\n".join(lines[statements[0].lineno - 1 : node.end_lineno]))
    has_parameters = bool(ast.unparse(node.args))
    signature = f"{node.name}({ast.unparse(node.args)})" if has_parameters else ""
    return Function(
        file=source.path,
        qualname=qualname,
        docstring_key=docstring_key(node),
        body_key=body_key(node),
        instruction=instruction,
        signature=signature,
        output=output,
        body_text=body_text,
    )


def held_out_functions(sources: list[Source]) -> tuple[list[Function], dict[str, str]]:
    """The functions of the dataset, sorted by key, and the text of every file without them.

    Of two functions with one docstring, one instruction or one body only one is a candidate, so none of them can
    reach two splits. Cut out of the text are all chosen functions, and every function anywhere that shares a
    docstring or a body with one. A function whose docstring or body is still found in the text (in a comment, say)
    stays cut but makes no row.
    """
    found = [
        function
        for source in sources
        if not NOT_DATASET & set(Path(source.path).parts)
        for node, qualname, nested in source.functions
        if not nested and (function := candidate(source, node, qualname)) is not None
    ]
    chosen: list[Function] = []
    taken: set[str] = set()
    for function in sorted(found, key=lambda f: fraction(f.key)):
        keys = {function.docstring_key, "i " + function.instruction.lower(), "b " + function.body_key, function.key}
        if keys & taken:
            continue
        taken |= keys
        chosen.append(function)
        if len(chosen) == CANDIDATES:
            break
    texts = cut(sources, chosen)
    leaked = still_found(texts, chosen)
    return sorted((f for f in chosen if f.key not in leaked), key=lambda f: f.key), texts


def cut(sources: list[Source], chosen: list[Function]) -> dict[str, str]:
    """The text of each file without the chosen functions and without functions of the same docstring or body."""
    docstrings = {function.docstring_key for function in chosen}
    bodies = {function.body_key for function in chosen}
    texts = {}
    for source in sources:
        lines = [f"{line}\n" for line in source.text.removesuffix("\n").split("\n")]
        for node, _, _ in source.functions:
            if docstring_key(node) in docstrings or body_key(node) in bodies:
                first, last = span(node)
                lines[first - 1 : last] = [""] * (last - first + 1)
        texts[source.path] = "".join(lines)
    return texts


def still_found(texts: dict[str, str], chosen: list[Function]) -> set[str]:
    """Keys of the functions whose instruction or body occurs in `texts`, blanks and quotation marks aside."""
    starts: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for function in chosen:
        for text in (function.instruction, function.body_text, function.body_key):
            words = words_of(text)
            starts.setdefault(tuple(words[:WINDOW]), []).append((function.key, words))
    first_words = {start[0] for start in starts}
    lengths = sorted({len(start) for start in starts})
    leaked = set()
    for text in texts.values():
        words = words_of(text)
        for position, word in enumerate(words):
            if word not in first_words:
                continue
            for length in lengths:
                for key, needle in starts.get(tuple(words[position : position + length]), ()):
                    if words[position : position + len(needle)] == needle:
                        leaked.add(key)
    return leaked


def words_of(text: str) -> list[str]:
    """Words and single signs of `text`, without blanks and quotation marks."""
    return re.findall(r"""\w+|[^\w\s"']""", text)


def build_corpus(root: Path | None = None) -> dict[str, object]:
    """Training and held-out documents: `{"python": version, "train": [text, ...], "heldout": [text, ...]}`.

    A hash of its path puts a whole file into one of the two; neither holds a dataset function.
    """
    sources = library_sources(root)
    _, texts = held_out_functions(sources)
    train, heldout = [], []
    for path, text in sorted(texts.items()):
        if text.strip():
            (heldout if fraction(path) * 100 < HELDOUT_FILES_PERCENT else train).append(text)
    # Files in path order would put near relatives side by side; the hash order is fixed too, but mixed.
    train.sort(key=fraction)
    return {"python": platform.python_version(), "train": train, "heldout": heldout}


def main() -> None:
    """Write the corpus as gzipped JSON."""
    parser = argparse.ArgumentParser(description="Write the base model's training text as gzipped JSON.")
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    corpus = build_corpus()
    out.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(out, "wt", encoding="utf-8", compresslevel=6) as stream:
        json.dump(corpus, stream)
    for part in ("train", "heldout"):
        texts = corpus[part]
        assert isinstance(texts, list)
        print(f"{part}: {len(texts)} files, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
