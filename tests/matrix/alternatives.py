"""Values to try for an option: made from its schema, or listed here where a schema cannot say what fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TYPES = ("bitfit", "bottleneck", "c3a", "dora", "layers", "ln_tuning", "loha", "lora", "qlora")
"""The types whose options are tried: those for which the tables below are complete."""

LISTED: dict[str, list[Any]] = {
    "target_modules": [["k_proj"], "all-linear"],
    "exclude_modules": [["v_proj"]],
    "modules_to_save": [["lm_head"]],
    "layers_to_transform": [[1], 0],
    "layers_pattern": ["blocks"],
    "trainable_token_indices": [[3, 4, 5]],
    "target_parameters": [["mlp.gate_proj.weight"]],
    "layer_replication": [[[0, 2], [1, 2]]],
    "rank_pattern": [{"v_proj": 2}],
    "alpha_pattern": [{"v_proj": 64}],
    "block_size": [4, 8],
    "block_size_pattern": [{"v_proj": 4}],
    "bias": ["all"],
    "init_lora_weights": ["random", "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "eva"],
    "bottleneck.bottleneck_size": [4],
    "bottleneck.non_linearity": ["gelu", "tanh"],
    "bottleneck.mh_adapter": [True],
    "bottleneck.output_adapter": [False],
    "bottleneck.is_parallel": [True],
    "bottleneck.original_ln_before": [False],
    "bottleneck.residual_before_ln": ["post_add", False],
    "bottleneck.leave_out": [[1]],
    "layers.last": [2],
    "layers.first": [1],
    "layers.range": [[0, 1]],
    "layers.pattern": [".*mlp.*"],
    "ln_tuning.target_modules": [["norm"]],
    "ln_tuning.exclude_modules": [["input_layernorm"]],
}
"""By the name of the option, or of the type and the option ("lora.r")."""

NEEDS: dict[str, dict[str, Any]] = {
    "exclude_modules": {"target_modules": ["q_proj", "v_proj"]},
    "layers_pattern": {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    "layers_to_transform": {"target_modules": ["q_proj"]},
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"]},
    "alpha_pattern": {"target_modules": ["q_proj", "v_proj"]},
    "target_parameters": {"target_modules": ["q_proj"], "dropout": 0.0},
    "layer_replication": {"target_modules": ["q_proj"]},
    "ensure_weight_tying": {"modules_to_save": ["embed_tokens"]},
    "bottleneck.output_adapter": {"mh_adapter": True},
    "bottleneck.is_parallel": {"original_ln_before": False},
    "bottleneck.adapter_residual_before_ln": {"ln_after": True},
    "bottleneck.original_ln_after": {"residual_before_ln": "post_add"},
    "layers.first": {"last": None},
    "layers.range": {"last": None},
    "layers.pattern": {"last": None},
    "ln_tuning.exclude_modules": {},
    "bitfit.target_modules": {},
}
"""Other options, with and without which an option is compared."""

REFUSED: dict[str, str] = {
    "layers_pattern": "only one list of layers exists, whose name changes nothing",
    "dora.target_parameters": "DoRA knows no parameters without a layer",
    "dora.lora_bias": "DoRA has no place for it",
}
"""Options every other value of which is refused here, with the reason."""

BASES: dict[str, str] = {"modules_to_save": "llama-fp32"}
"""The base on which an option is tried, where it is not the usual one."""


def listed(table: dict[str, Any], kind: str, option: str, default: Any) -> Any:
    """Return what a table says about an option of a type, by both names or by the option's alone."""
    return table.get(f"{kind}.{option}", table.get(option, default))


def alternatives(kind: str, option: str, schema: dict[str, Any]) -> list[Any]:
    """Return values other than the default, a few for numbers and all of a choice."""
    found = listed(LISTED, kind, option, None)
    default = schema.get("default")
    made = list(found if found is not None else _of_schema(schema, default))
    return [value for number, value in enumerate(made) if value != default and value not in made[:number]]


def _of_schema(schema: dict[str, Any], default: Any) -> Iterator[Any]:
    """Yield values that a schema allows."""
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _of_schema(part, default)
    if "enum" in schema:
        yield from (value for value in schema["enum"] if value is not None)
        return
    kinds = schema.get("type", ())
    for kind in (kinds,) if isinstance(kinds, str) else kinds:
        if kind == "boolean":
            yield from (True, False)
        elif kind in ("integer", "number"):
            yield from (value for value in _numbers(kind, default) if _within(value, schema))


def _numbers(kind: str, default: Any) -> Iterator[Any]:
    """Yield two numbers beside a default, or small ones where it is none."""
    number = not isinstance(default, bool) and isinstance(default, (int, float))
    if kind == "integer":
        yield from (int(default * 2) or 1, int(default) // 2 or int(default) + 1) if number else (2, 4)
    else:
        yield from (default * 2 or 0.5, default / 2 or 0.25) if number else (0.5,)


def _within(value: float, schema: dict[str, Any]) -> bool:
    """Return whether a number is within the bounds of a schema."""
    return (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and value > schema.get("exclusiveMinimum", value - 1)
        and value < schema.get("exclusiveMaximum", value + 1)
    )
