"""Values to try for an option: made from its schema, or listed here where a schema cannot say what fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NOT_YET: dict[str, str] = {}
"""Types whose options are not tried, with what is missing in the tables below."""

COUNT = 464
"""How many options of all types are tried; PEFT's are options by themselves, so a new release changes it."""

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
    "adalora.r": [16, 2],
    "adalora.total_step": [12, 100],
    "adalora.use_rslora": [True],
    "adalora.use_dora": [True],
    "adalora.tinit": [0, 4],
    "adalora.orth_reg_weight": [0.5],
    "adamss.r": [4, 8],
    "adamss.init_warmup": [1, 6],
    "adamss.final_warmup": [5, 20],
    "adamss.svd_threshold": [0.9],
    "boft.boft_block_size": [2, 8],
    "boft.boft_block_num": [4, 8],
    "ia3.feedforward_modules": [["v_proj"], ".*v_proj"],
    "init_text": ["other words"],
    "lambda_pattern": [{"v_proj": 5.0}],
    "lokr.decompose_factor": [2, 4],
    "n_frequency_pattern": [{"v_proj": 7}],
    "oft.r": [4, 8],
    "oft.module_dropout": [0.5],
    "peanut.act_fn": ["gelu", "tanh"],
    "psoft.cayley_neumann_eps": [0.01],
    "waveft.wavelet_family": ["coif2", "db2", "sym3"],
}
"""By the name of the option, or of the type and the option ("lora.r")."""

CHOICE: dict[str, Any] = {
    "use_asa": True,
    "asa_target_subspaces": 20,
    "init_warmup": 2,
    "final_warmup": 10,
    "mask_interval": 2,
}
"""A choice of subspaces (AdaMSS) within a run as short as those here."""

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
    "init_text": {"init": "text", "init_text": "some words"},
    "lambda_pattern": {"target_modules": ["q_proj", "v_proj"]},
    "n_frequency_pattern": {"target_modules": ["q_proj", "v_proj"]},
    "adamss.use_dynamic_rank": {"subspace_rank": 4},
    "adamss.svd_threshold": {"use_dynamic_rank": True, "subspace_rank": 4},
    **{
        f"adamss.{name}": CHOICE
        for name in (
            "asa_target_subspaces",
            "init_warmup",
            "final_warmup",
            "mask_interval",
            "asa_importance_beta",
            "asa_uncertainty_beta",
            "asa_schedule_exponent",
        )
    },
    "deft.init_scale": {"init_weights": False},
    "ia3.feedforward_modules": {"target_modules": ["k_proj", "v_proj", "down_proj"]},
    "lokr.decompose_both": {"r": 1},
    "lokr.rank_dropout_scale": {"rank_dropout": 0.5},
    "miss.mini_r": {"init_weights": "mini"},
    "oft.eps": {"coft": True},
    "p_tuning.encoder_num_layers": {"encoder_reparameterization_type": "LSTM"},
    "p_tuning.encoder_dropout": {"encoder_reparameterization_type": "LSTM"},
    "prefix_tuning.encoder_hidden_size": {"prefix_projection": True},
    "psoft.psoft_svd_lowrank_niter": {"psoft_svd": "lowrank"},
    "psoft.random_seed": {"psoft_svd": "lowrank"},
    "psoft.num_cayley_neumann_terms": {"use_cayley_neumann": True},
    "psoft.cayley_neumann_eps": {"use_cayley_neumann": True},
    "supertuning.lora_alpha": {"r": 2},
    "supertuning.lora_dropout": {"r": 2},
    "tinylora.init_v_bound": {"init_weights": "uniform"},
}
"""Other options, with and without which an option is compared."""

ALONG: dict[str, dict[str, Any]] = {
    "adamss.use_asa": CHOICE,
    "adamss.use_dynamic_rank": {"svd_threshold": 0.9},
}
"""Options that only come with an option's other value, as they are refused without it."""

REFUSED: dict[str, str] = {
    "adalora.total_step": "the length of the run, which these values are not",
    **{
        f"adalora.{name}": "Ludwig's own type has it, and AdaLoRA has nothing of the kind"
        for name in (
            "use_rslora",
            "use_dora",
            "init_lora_weights",
            "rank_pattern",
            "alpha_pattern",
            "layer_replication",
        )
    },
    "oft.module_dropout": "PEFT makes the dropout and never applies it",
    "ia3.fan_in_fan_out": "it follows from the layers, which are no Conv1D here",
    "layers_pattern": "only one list of layers exists, whose name changes nothing",
    "dora.target_parameters": "DoRA knows no parameters without a layer",
    "dora.lora_bias": "DoRA has no place for it",
}
"""Options every other value of which is refused here, with the reason."""

BASES: dict[str, str] = {"modules_to_save": "llama-fp32", "adaption_prompt.*": "llama-fp32"}
"""The base on which an option is tried, where it is not the usual one."""


def listed(table: dict[str, Any], kind: str, option: str, default: Any) -> Any:
    """Return what a table says about an option of a type, by both names, by the type's or by the option's alone."""
    return table.get(f"{kind}.{option}", table.get(f"{kind}.*", table.get(option, default)))


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
