"""Write what docs say about options and adapter types from the schema classes.

usage: python scripts/generate_docs.py [--check]

That is docs/configuration.md, docs/methods/README.md, and what stands between two markers on the page of each adapter
type (docs/methods/<type>.md), whose text is written by hand. With --check nothing is written, and the exit status says
whether every type has a page and all of it is up to date.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
DOCS = SCRIPTS.parent / "docs"
CONFIGURATION_HEAD = SCRIPTS / "configuration_head.md"
BEGIN, END = "<!-- options:begin -->", "<!-- options:end -->"
OURS, HOST = "ludwig_peft_plugin", "ludwig"

INDEX = """\
# Adapter types

<!-- Written by scripts/generate_docs.py from the classes of the types. -->

`adapter: {type: <type>}` in a config; each page has the equation, where it sits, when to choose it and every option. A
learning rate is the default of `trainer.learning_rate` for a config that gives none. [All compared](../comparison.md)
on the shipped model, each at several rates.
"""
INHERITED = {
    "pretrained_adapter_weights": "A trained adapter to go on from: a folder or a name on the Hugging Face hub.",
    "postprocessor": "`{merge_adapter_into_base_model: true}` saves the merged model.",
}
"""What Ludwig's options of every adapter type do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    problems = []
    for name, text in files().items():
        path = DOCS / name
        current = path.read_text(encoding="utf-8") if path.exists() else ""
        if text is None:
            problems.append(f"docs/{name} must be written, with the lines {BEGIN} and {END}")
        elif check and current != text:
            problems.append(f"docs/{name} is out of date: run python scripts/generate_docs.py")
        elif not check:
            path.write_text(text, encoding="utf-8")
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return int(bool(problems))


def files() -> dict[str, str | None]:
    """Return the text of every file under docs/ that is written here; None for a page nobody has written yet."""
    from ludwig_peft_plugin.register import register

    register()
    pages = {f"methods/{name}.md": page(name, cls) for name, cls in adapter_types().items()}
    return {"configuration.md": document(), "methods/README.md": index(), **pages}


def document() -> str:
    """Return the page of all options but those of adapter types."""
    from ludwig_peft_plugin.config.llm_config import LLMConfig
    from ludwig_peft_plugin.config.sections import options

    top = options(LLMConfig)
    parts = [CONFIGURATION_HEAD.read_text(encoding="utf-8"), "## Top level\n", table(top.values())]
    parts += [
        "## adapter\n",
        "`adapter: lora` is short for `adapter: {type: lora}`. Options: [types](methods/README.md).",
    ]
    for name in ("quantization", "preprocessing", "prompt", "generation", "evaluation", "model_parameters"):
        parts += [f"## {name}\n", *section(top[name].shape.cls, name)]
    parts += ["## export\n", table(options(top["export"].shape.item.cls).values())]
    parts += ["## trainer\n", *trainer(top["trainer"].shape)]
    parts += ["## adapters\n", *section(top["adapters"].shape.cls, "adapters")]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def section(cls: type, path: str) -> Iterator[str]:
    """Yield the table of a section and of the sections in it."""
    from ludwig_peft_plugin.config.sections import Choice, Section, options

    fields = options(cls)
    yield table(fields.values(), cls)
    for name, option in fields.items():
        inner = f"{path}.{name}"
        if isinstance(option.shape, Section):
            yield f"### {inner}\n"
            yield from section(option.shape.cls, inner)
        elif isinstance(option.shape, Choice):
            for kind, kind_cls in option.shape.types().items():
                yield f"### {inner}: {kind}\n"
                yield table((o for key, o in options(kind_cls).items() if key != option.shape.key), kind_cls)


def adapter_types() -> dict[str, Any]:
    """Return the plugin's and Ludwig's adapter types by name, in alphabetical order."""
    from ludwig.schema.llms.peft import adapter_registry

    types = sorted(adapter_registry.items())
    return {name: cls for name, cls in types if cls.__module__.split(".")[0] in (OURS, HOST)}


def page(name: str, cls: Any) -> str | None:
    """Return a type's page with its facts and options between the markers, None where there is no such page."""
    path = DOCS / "methods" / f"{name}.md"
    before, begin, rest = (path.read_text(encoding="utf-8") if path.exists() else "").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return None
    return f"{before}{BEGIN}\n{facts(name, cls)}\n\n{chr(10).join(options_of(cls))}\n{END}{after}"


def options_of(cls: Any) -> Iterator[str]:
    """Yield the table of a type's options and of the sections in it."""
    from ludwig_peft_plugin.config.sections import Section, options

    yield table((option for key, option in options(cls).items() if key != "type"), cls)
    for key, option in options(cls).items():
        if isinstance(option.shape, Section) and is_ours(option.shape.cls):
            yield f"\n### {key}\n"
            yield table(options(option.shape.cls).values(), option.shape.cls)


def facts(name: str, cls: Any) -> str:
    """Return a table of what a type says about itself."""
    from ludwig_peft_plugin.config.adapter_types import capabilities
    from ludwig_peft_plugin.encoders.config import fits

    row = {
        "family": cls.family,
        "other names": ", ".join(other_names(name)) or "none",
        "starts as the base": yes(cls.starts_as_base),
        "quantised bases": yes(capabilities(cls).quantized_base),
        "can be merged": yes(capabilities(cls).mergeable),
        "several on one base": yes(cls.several),
        "text encoders": yes(fits(cls)),
        "learning rate": learning_rate(cls),
    }
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (row.keys(), ["---"] * len(row), row.values()))


def index() -> str:
    """Return the table of all types, by family."""
    from ludwig_peft_plugin.adapters.base import FAMILIES

    head = "| type | what it does | good for | paper | quantised bases | can be merged | learning rate |"
    parts = [INDEX]
    for family in FAMILIES:
        rows = [row(name, cls) for name, cls in adapter_types().items() if cls.family == family]
        parts.append("\n".join([f"## {family.capitalize()}\n", head, "|---" * 7 + "|", *rows]))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def row(name: str, cls: Any) -> str:
    """Return a type's row of the index."""
    from ludwig_peft_plugin.config.adapter_types import capabilities

    able, summary = capabilities(cls), cls.description().partition(". ")[0].rstrip(".")
    names = ", ".join([f"[`{name}`]({name}.md)", *other_names(name)])
    cells = [names, cell(summary), cell(cls.good_for), paper(cls), yes(able.quantized_base), yes(able.mergeable)]
    return f"| {' | '.join([*cells, learning_rate(cls)])} |"


def paper(cls: Any) -> str:
    """Return the link to a type's paper: "Hu et al. 2021, https://..." says its class."""
    authors, _, address = cls.paper.rpartition(", ")
    return f"[{authors}]({address})"


def learning_rate(cls: Any) -> str:
    """Return the default learning rate of a type, or Ludwig's."""
    from ludwig.schema.trainer import get_llm_trainer_cls

    from ludwig_peft_plugin.config.sections import options

    stock = options(get_llm_trainer_cls("finetune"))["learning_rate"].default
    return f"{stock:g} (Ludwig's)" if cls.learning_rate is None else f"{cls.learning_rate:g}"


def trainer(shape: Any) -> Iterator[str]:
    """Yield the tables of the trainers that fine-tune and that only predict."""
    from ludwig_peft_plugin.config.sections import Section, options

    yield "`trainer.type` has to be given: `finetune` trains, `none` only evaluates and predicts.\n"
    for name in ("finetune", "none"):
        cls = shape.resolve(name)
        yield f"### trainer: {name}\n"
        yield table((option for key, option in options(cls).items() if key != "type"), cls)
    cls = shape.resolve("finetune")
    for key, option in options(cls).items():
        if isinstance(option.shape, Section):
            yield f"### trainer.{key}\n"
            yield table(options(option.shape.cls).values(), option.shape.cls)


def table(fields: Iterable[Any], cls: type | None = None) -> str:
    """Return a table of options, without those that never have an effect in this section."""
    from ludwig_peft_plugin.config.no_effect import unused_options

    unused = unused_options(cls) if cls is not None else frozenset()
    rows = [
        f"| `{option.name}` | {cell(values_of(option))} | {cell(default_of(option))} | {cell(about(option))} |"
        for option in fields
        if option.name not in unused
    ]
    return "| option | values | default | |\n|---|---|---|---|\n" + "\n".join(rows)


def values_of(option: Any) -> str:
    """Return which values an option takes, in words."""
    from ludwig_peft_plugin.config.sections import Choice, Free, ListOf, MapOf, Section
    from ludwig_peft_plugin.config.values import allowed

    match option.shape:
        case Section() | Choice() as shape:
            return "options" + (", or null" if shape.nullable else "")
        case ListOf() | MapOf():
            return "a list of options" if isinstance(option.shape, ListOf) else "options by name"
        case Free():
            return "any"
    return str(allowed(option))


def default_of(option: Any) -> str:
    """Return an option's default as it would stand in YAML."""
    from ludwig_peft_plugin.config.sections import Choice, Section
    from ludwig_peft_plugin.config.values import show

    if option.required or option.name == "base_model":
        return "(required)"
    if isinstance(option.shape, Section | Choice) and option.default is not None:
        return "its options' defaults"
    return f"`{show(option.default)}`"


def about(option: Any) -> str:
    """Return what an option does, where the plugin declares it or every adapter type has it."""
    from ludwig.schema.llms.peft import BaseAdapterConfig

    inherited = INHERITED.get(option.name, "") if option.declared_in is BaseAdapterConfig else ""
    return str(option.description) if is_ours(option.declared_in) else inherited


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == OURS


def other_names(name: str) -> list[str]:
    from ludwig_peft_plugin.config.adapter_types import canonical_types

    return [f"`{alias}`" for alias, target in canonical_types().items() if target == name]


def yes(value: bool) -> str:
    return "yes" if value else "no"


def cell(text: str) -> str:
    """Return text that fits a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
