"""Which options of a LoRA adapter cannot stand together, on whatever base; `lora_checks` has those of a given base."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ludwig_peft_plugin.adapters.lora_fields import SECTIONS

if TYPE_CHECKING:
    from ludwig_peft_plugin.adapters.lora_options import LoraOptions


def init_problems(options: LoraOptions) -> list[str]:
    """Return what is wrong with the initialisation and the options it excludes or needs."""
    init, problems = str(options.init_lora_weights), []
    for method, name in SECTIONS.items():
        if getattr(options, name) is not None and init != method:
            problems.append(
                f"{name} has no effect with init_lora_weights: {init}; set init_lora_weights: {method}, or remove "
                f"{name}."
            )
    if options.loftq_config is not None and options.loftq_config.loftq_iter != 1:
        problems.append(
            f"loftq_config.loftq_iter: {options.loftq_config.loftq_iter} is not possible, because further iterations "
            "quantise the base itself anew; use 1."
        )
    odd = sorted({rank for rank in (options.r, *(options.rank_pattern or {}).values()) if rank % 2})
    if init == "orthogonal" and odd:
        problems.append(f"init_lora_weights: orthogonal needs even ranks, not {odd[0]}; change r or rank_pattern.")
    if options.lora_bias and (options.uses_dora or init not in ("default", "random")):
        blocker = "DoRA" if options.uses_dora else f"init_lora_weights: {init}"
        problems.append(f"lora_bias: true does not work with {blocker}; it needs plain LoRA with the default init.")
    if init == "eva" and options.trainable_token_indices is not None:
        problems.append(
            "init_lora_weights: eva does not work with trainable_token_indices, whose inputs are no numbers to "
            "decompose; use default or pissa, or modules_to_save: [embed_tokens]."
        )
    if init == "mica" and options.uses_dora:
        problems.append("init_lora_weights: mica does not work with DoRA; use default, pissa or olora.")
    if init == "mica" and options.loraplus_lr_ratio is not None:
        problems.append("loraplus_lr_ratio has no effect with init_lora_weights: mica, which keeps B frozen.")
    if options.layer_replication and options.init.changes_base:
        problems.append(
            f"layer_replication does not work with init_lora_weights: {init}, which changes the base's weights: "
            "replicated layers share theirs. Use default, gaussian or eva."
        )
    return problems


def target_problems(options: LoraOptions) -> list[str]:
    """Return what is wrong with the options that say where adapters go."""
    problems = []
    expression = isinstance(options.target_modules, str) and options.target_modules.lower() != "all-linear"
    for name, value in (("target_modules", options.target_modules), ("exclude_modules", options.exclude_modules)):
        if isinstance(value, str) and (error := _regex_error(value)):
            problems.append(f"{name}: {value!r} is not a regular expression ({error}); use a list for plain names.")
    if expression and options.layers_to_transform is not None:
        problems.append(
            "layers_to_transform does not work with a regular expression in target_modules; name the layers in the "
            "expression, or give target_modules as a list or all-linear."
        )
    if options.layers_pattern is not None and options.layers_to_transform is None:
        problems.append("layers_pattern has no effect without layers_to_transform; add that, or remove it.")
    for first, end in options.layer_replication or []:
        if first >= end:
            problems.append(f"layer_replication: [{first}, {end}] is empty; the second number is past the last.")
    if options.target_parameters:
        blockers = {
            f"dropout: {options.dropout}": options.dropout > 0,
            "lora_bias: true": options.lora_bias,
            "DoRA": options.uses_dora,
            f"init_lora_weights: {options.init_lora_weights}": options.init.layers_only,
        }
        problems += [
            f"target_parameters does not work with {name}: the update is added to the parameter itself. Use plain "
            "LoRA with dropout: 0 and the default init."
            for name, blocks in blockers.items()
            if blocks
        ]
    return problems


def _regex_error(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None
