"""Write docs/configuration.md, whose option tables come from the schema classes.

usage: python scripts/generate_docs.py [--check]

With --check nothing is written, and the exit status says whether the file is up to date.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
OURS, HOST = "ludwig_peft_plugin", "ludwig"

INTRODUCTION = """\
# Configuration

<!-- Written by scripts/generate_docs.py. Change the schema classes, or the text in that script, and run it again. -->

A model is one YAML file. What is not described here is Ludwig's own and keeps its meaning; options without a
description are explained in [Ludwig's documentation](https://ludwig.ai/0.17/configuration/large_language_model/).

```yaml
model_type: llm
base_model: tiny-llama-python
dataset: datasets/stdlib_instructions.csv
prompt:
  template: "### Instruction: {instruction}\\n### Input: {input}\\n### Response: "
input_features: [{name: prompt, type: text}]
output_features: [{name: output, type: text}]
adapter: {type: qlora, r: 16}
trainer: {type: finetune, epochs: 1, batch_size: 16, learning_rate: 2.0e-4}
export: [{format: adapter}, {format: merged}]
```

## Checks

Before anything is loaded, the whole file is checked. One error lists everything that is wrong, a line each: unknown
keys with the option that was probably meant, values that are not allowed with those that are, and options that would
have no effect with the chosen trainer or adapter. `ludwig-peft check config.yaml` runs the checks alone.

`ludwig-peft schema` writes a JSON schema with which an editor completes and checks configs. In VS Code with the YAML
extension, begin a config with

```yaml
# yaml-language-server: $schema=ludwig_llm.schema.json
```

`ludwig export_schema --model-type llm` prints the same schema.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    text = document()
    if check:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current != text:
            print("docs/configuration.md is out of date: run python scripts/generate_docs.py", file=sys.stderr)
        return int(current != text)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(text, encoding="utf-8")
    return 0


def document() -> str:
    """Return the whole page."""
    from ludwig_peft_plugin.register import register

    register()
    from ludwig_peft_plugin.config.llm_config import LLMConfig
    from ludwig_peft_plugin.config.sections import options

    top = options(LLMConfig)
    parts = [INTRODUCTION, "## Top level\n", table(top.values())]
    parts += ["## adapter\n", *adapters(top["adapter"].shape)]
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


def adapters(shape: Any) -> Iterator[str]:
    """Yield what each adapter type is, and its table."""
    from ludwig_peft_plugin.config.adapter_types import canonical_types, capabilities
    from ludwig_peft_plugin.config.sections import Section, options

    types = {name: cls for name, cls in shape.types().items() if cls.__module__.split(".")[0] in (OURS, HOST)}
    yield "`adapter: lora` is short for `adapter: {type: lora}`. Types of Ludwig's are listed after the plugin's.\n"
    yield "| type | other names | on a quantised base | can be merged |\n|---|---|---|---|\n" + "\n".join(
        f"| `{name}` | {other_names(name, canonical_types())} | {yes(capabilities(cls).quantized_base)} "
        f"| {yes(capabilities(cls).mergeable)} |"
        for name, cls in ordered(types)
    )
    for name, cls in ordered(types):
        yield f"### adapter: {name}\n"
        if is_ours(cls):
            yield f"{cls.description()}\n"  # type: ignore[attr-defined]
        fields = options(cls)
        yield table((option for key, option in fields.items() if key != "type"), cls)
        for key, option in fields.items():
            if is_ours(cls) and isinstance(option.shape, Section) and is_ours(option.shape.cls):
                yield f"#### adapter: {name}: {key}\n"
                yield table(options(option.shape.cls).values(), option.shape.cls)


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
    """Return what an option does, where the plugin declares it."""
    return str(option.description) if is_ours(option.declared_in) else ""


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == OURS


def ordered(types: dict[str, type]) -> list[tuple[str, type]]:
    """Return the types with the plugin's first."""
    return sorted(types.items(), key=lambda item: (not is_ours(item[1]), item[0]))


def other_names(name: str, aliases: dict[str, str]) -> str:
    return ", ".join(f"`{alias}`" for alias, target in aliases.items() if target == name)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def cell(text: str) -> str:
    """Return text that fits a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
