"""Which fields of `peft.LoraConfig` the LoRA adapters offer, under which option, and why the others are absent."""

from __future__ import annotations

from ludwig_peft_plugin.adapters.peft_options import BOOKKEEPING

PEFT_FIELDS: dict[str, str] = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "bias": "bias_type",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "layer_replication": "layer_replication",
    "ensure_weight_tying": "ensure_weight_tying",
    "use_rslora": "use_rslora",
    "lora_bias": "lora_bias",
    "init_lora_weights": "init_lora_weights",
    "eva_config": "eva_config",
    "corda_config": "corda_config",
    "loftq_config": "loftq_config",
    "lora_ga_config": "lora_ga_config",
    "use_dora": "use_dora",
    "runtime_config": "ephemeral_gpu_offload",
}
"""Option name by field of `peft.LoraConfig`. `use_dora` is an option of `lora` and fixed in `dora` and `qlora`."""

SECTIONS = {"eva": "eva_config", "corda": "corda_config", "loftq": "loftq_config", "lora_ga": "lora_ga_config"}
"""The section of settings by value of `init_lora_weights`."""

UNSUPPORTED: dict[str, str] = {
    **BOOKKEEPING,
    "velora_config": "VeLoRA estimates gradients from the average of a batch, so they would depend on which rows share "
    "one; the plugin promises that batch composition and accumulation change nothing",
    "kasa_config": "KaSA needs extra terms in the loss, which the trainer has no place for",
    "monteclora_config": "MonteCLoRA needs extra terms in the loss, which the trainer has no place for",
    "alora_invocation_tokens": "Activated LoRA looks for its invocation tokens row by row in padded batches; the "
    "plugin's batches are not padded",
    "use_qalora": "PEFT has QALoRA for GPTQ bases only, which Ludwig does not load",
    "qalora_group_size": "PEFT has QALoRA for GPTQ bases only, which Ludwig does not load",
    "use_bdlora": "a layout for serving many adapters on several GPUs; it restricts training and gains nothing in it",
    "arrow_config": "Arrow routes between several trained adapters; there is one here",
    "corda_config.cache_file": "PEFT writes it as a pickle",
    "corda_config.covariance_file": "PEFT writes it as a pickle",
    "corda_config.use_float16_for_covariance": "leaves the covariance in the base's type, which is unstable in "
    "16 bits and changes nothing in float32",
    "corda_config.verbose": "shows a progress bar, and changes nothing else",
    "corda_config.prune_temporary_fields": "keeps intermediate results on the model, for debugging PEFT",
}
"""Why a field of `peft.LoraConfig`, or of one of its sections, is no option."""
