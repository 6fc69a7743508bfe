"""Check an LLM config before Ludwig does: every key known, every value allowed, every option able to take effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ludwig.error import ConfigValidationError
from ludwig.schema.model_types.ecd import ECDModelConfig

from ludwig_peft_plugin.config import values
from ludwig_peft_plugin.config.no_effect import unused_options
from ludwig_peft_plugin.config.problems import Problem, report
from ludwig_peft_plugin.config.rules import rule_problems
from ludwig_peft_plugin.config.sections import Choice, Free, ListOf, MapOf, Option, Section, Shape, options
from ludwig_peft_plugin.config.suggest import closest, hint, renamed

# Where an option given at the wrong level is looked for, in this order.
HOMES = ("trainer", "adapter", "generation", "preprocessing", "prompt", "quantization", "model_parameters")


def check_config(config: dict[str, Any]) -> None:
    """Raise one error that lists everything wrong with an LLM config, a line each.

    Args:
        config: the whole config as Ludwig has it after upgrading old keys and merging `defaults` into the features.

    Raises:
        ConfigValidationError: naming each option by its path, what is wrong with it and what would work.
    """
    problems = find_problems(config)
    if problems:
        raise ConfigValidationError(report(problems))


def find_problems(config: dict[str, Any]) -> list[Problem]:
    """Return everything wrong with an LLM config, in the order of the config."""
    from ludwig_peft_plugin.config.llm_config import LLMConfig

    walk = _Walk(config)
    problems = list(walk.section(config, Section(LLMConfig), ""))
    problems += rule_problems(config)
    return list({problem.path: problem for problem in reversed(problems)}.values())[::-1]


def section_problems(config: dict[str, Any], adapter: Any, path: str) -> list[Problem]:
    """Return what is wrong with an adapter section at `path` of a config of any model type, keys and values alone."""
    from ludwig_peft_plugin.config.llm_config import LLMConfig

    return list(_Walk(config).value(adapter, options(LLMConfig)["adapter"].shape, path))


@dataclass(frozen=True)
class _Walk:
    """Compares a config with the schema classes."""

    config: dict[str, Any]

    def value(self, value: Any, shape: Shape, path: str, option: Option | None = None) -> Iterator[Problem]:
        """Yield what is wrong with the value of one option."""
        match shape:
            case Free():
                return
            case Section():
                yield from self.section(value, shape, path)
            case Choice():
                yield from self.choice(value, shape, path)
            case ListOf():
                yield from self.entries(value, shape, path)
            case MapOf():
                yield from self.named(value, shape, path)
            case _:
                text = values.problem(value, option) if option is not None else None
                if text is not None:
                    yield Problem(path, text)

    def section(self, value: Any, shape: Section, path: str) -> Iterator[Problem]:
        """Yield what is wrong with a mapping whose options are the fields of a class."""
        if value is None:
            yield from self.null(shape.nullable, path)
        elif not isinstance(value, dict):
            yield Problem(path, f"{values.show(value)} is not allowed; give a mapping of options")
        else:
            yield from self.mapping(value, options(shape.cls), path)

    def choice(self, value: Any, shape: Choice, path: str) -> Iterator[Problem]:
        """Yield what is wrong with a mapping whose options depend on its type."""
        if value is None:
            yield from self.null(shape.nullable, path)
            return
        if isinstance(value, str) and shape.shorthand:
            value = {shape.key: value}
        if not isinstance(value, dict):
            meant = f"give a mapping with a `{shape.key}`"
            if isinstance(value, str) and value in shape.registry:
                meant = f"write {{{shape.key}: {value}}}"
            yield Problem(path, f"{values.show(value)} is not allowed; {meant}")
            return
        given = value.get(shape.key)
        name = shape.default if given is None else shape.canonical(given)
        if name is None:
            what = "is missing" if given is None else f"{values.show(given)} is not known"
            yield Problem(f"{path}.{shape.key}", f"{what}; {hint(str(given or ''), shape.names())}")
            return
        if path == "trainer" and given is None:
            return  # which options there are depends on the type, whose absence is reported elsewhere
        fields = {key: option for key, option in options(shape.resolve(name)).items() if key != shape.key}
        rest = {key: entry for key, entry in value.items() if key != shape.key}
        yield from self.mapping(rest, fields, path, (shape, name))

    def entries(self, value: Any, shape: ListOf, path: str) -> Iterator[Problem]:
        """Yield what is wrong with a list of sections."""
        if not isinstance(value, list | tuple):
            if value is not None or "." in path:
                yield Problem(path, f"{values.show(value)} is not allowed; give a list")
            return
        if len(value) < shape.minimum or (shape.maximum is not None and len(value) > shape.maximum):
            bound = shape.minimum if len(value) < shape.minimum else shape.maximum
            yield Problem(path, f"holds {len(value)} entries; give {bound}")
        for index, entry in enumerate(value):
            if shape.shorthand and isinstance(entry, str):
                entry = {shape.shorthand: entry}
            yield from self.value(entry, shape.item, f"{path}[{index}]")

    def named(self, value: Any, shape: MapOf, path: str) -> Iterator[Problem]:
        """Yield what is wrong with a mapping from free names to sections."""
        if not isinstance(value, dict):
            yield Problem(path, f"{values.show(value)} is not allowed; give a mapping from names to sections")
            return
        for name, entry in value.items():
            yield from self.value(entry, shape.item, f"{path}.{name}")

    def null(self, allowed: bool, path: str) -> Iterator[Problem]:
        """Yield the problem of a null section; at the top an empty section means its defaults."""
        if not allowed and "." in path:
            yield Problem(path, "null has no meaning here; leave the line out for the default")

    def mapping(
        self, value: dict[str, Any], fields: dict[str, Option], path: str, chosen: tuple[Choice, str] | None = None
    ) -> Iterator[Problem]:
        """Yield what is wrong with the entries of a mapping."""
        prefix = f"{path}." if path else ""
        for name, field in fields.items():
            if field.required and value.get(name) is None:
                yield Problem(f"{prefix}{name}", f"is missing; give {values.allowed(field)}")
        for key, entry in value.items():
            place = f"{prefix}{key}"
            option = fields.get(key)
            if option is not None:
                yield from self.value(entry, option.shape, place, option)
            elif not self.tolerated(key, path):
                yield self.unknown(str(key), fields, place, chosen)

    def tolerated(self, key: str, path: str) -> bool:
        """Return whether an unknown key was written by Ludwig itself.

        Ludwig merges `defaults` into the features, and stores what it learnt from the data in the encoder and decoder
        of a feature it has seen before, which it marks with `proc_column`.
        """
        top, _, inner = path.partition(".")
        if path == "defaults":
            return key in ("category", "text")
        if not top.endswith("]") or not top.startswith(("input_features[", "output_features[")):
            return False
        features, _, index = top[:-1].partition("[")
        feature = self.config[features][int(index)]
        if inner.split(".")[0] in ("encoder", "decoder") and feature.get("proc_column"):
            return True
        merged: Any = (self.config.get("defaults") or {}).get(feature.get("type"), {})
        for part in inner.split(".") if inner else ():
            merged = merged.get(part, {}) if isinstance(merged, dict) else {}
        return isinstance(merged, dict) and key in merged

    def unknown(self, key: str, fields: dict[str, Option], path: str, chosen: tuple[Choice, str] | None) -> Problem:
        """Return the problem of a key that is no option here."""
        if chosen is not None:
            shape, name = chosen
            others = [
                f"`{other}`" for other, cls in shape.types().items() if key in options(cls).keys() - unused_options(cls)
            ]
            if others and renamed(key, fields) is None:
                return Problem(path, f"is an option of {shape.key} {', '.join(others[:5])}, not of `{name}`")
            unused = unused_options(shape.resolve(name))
            fields = {other: option for other, option in fields.items() if other not in unused}
        if path == key and closest(key, fields) is None:
            home = next((home for home in HOMES if key in _options_of(home)), None)
            if home is not None:
                return Problem(path, f"does not stand at the top; write it as `{home}.{key}`")
            if key in options(ECDModelConfig):
                return Problem(path, "belongs to `model_type: ecd`, not to a language model")
        feature, _, part = path.rpartition(".")[0].rpartition(".")
        if part in ("encoder", "decoder") and feature.endswith("]"):
            # Ludwig moves what it does not know in a feature down here, so the mistake may have been made above.
            return Problem(f"{feature}.{key}", f"unknown option; {hint(key, {**_feature_options(feature), **fields})}")
        return Problem(path, f"unknown option; {hint(key, fields)}")


def _options_of(section: str) -> dict[str, Option]:
    """Return the options of a top-level section, of every type it can have."""
    from ludwig_peft_plugin.config.llm_config import LLMConfig

    shape = options(LLMConfig)[section].shape
    if isinstance(shape, Section):
        return options(shape.cls)
    assert isinstance(shape, Choice)
    return {name: option for cls in shape.types().values() for name, option in options(cls).items()}


def _feature_options(feature: str) -> dict[str, Option]:
    from ludwig_peft_plugin.config.llm_config import LLMConfig

    shape = options(LLMConfig)[feature.partition("[")[0]].shape
    assert isinstance(shape, ListOf)
    assert isinstance(shape.item, Choice)
    return {name: option for cls in shape.item.types().values() for name, option in options(cls).items()}
