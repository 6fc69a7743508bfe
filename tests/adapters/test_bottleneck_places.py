"""Places of bottleneck adapters in blocks of many architectures: found, exact at the start, where they should be."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from disturbed import disturbed
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from ludwig_peft_plugin.adapters.bottleneck import BottleneckConfig, BottleneckLayer
from ludwig_peft_plugin.adapters.bottleneck.config import ARCHITECTURES
from ludwig_peft_plugin.adapters.bottleneck.places import FEED_FORWARD, find_sites

COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
GPT = {
    "vocab_size": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}
BLOOM = {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
NEO = {**COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
SERIAL: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        kind: (kind, GROUPED)
        for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "phi3", "granite", "starcoder2")
    },
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 2}),
    "gpt2": ("gpt2", GPT),
    "gpt_neo": ("gpt_neo", NEO),
    "gpt_neox serial": ("gpt_neox", {**COMMON, "use_parallel_residual": False}),
    "opt": ("opt", OPT),
    "bloom": ("bloom", BLOOM),
    "mpt": ("mpt", {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
}
"""Blocks that add attention first, then feed-forward, and normalise before each."""
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", COMMON),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}),
    "phi": ("phi", COMMON),
    "cohere": ("cohere", GROUPED),
    "falcon": ("falcon", {**COMMON, "alibi": False}),
    "opt 350m": ("opt", {**OPT, "do_layer_norm_before": False}),
    "bert": ("bert", COMMON),
    "roberta": ("roberta", COMMON),
    "electra": ("electra", {**COMMON, "embedding_size": 32}),
    "distilbert": ("distilbert", {"vocab_size": 40, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "modernbert": ("modernbert", {**COMMON, "cls_token_id": 1, "sep_token_id": 2}),
}
"""Blocks whose two halves run side by side, that normalise afterwards, or that are no decoder's."""
MASKED = {"bert", "roberta", "electra", "distilbert", "modernbert"}
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def build(kind: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if kind in MASKED else AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **options)
    config._attn_implementation = "eager"
    model: PreTrainedModel = auto.from_config(config).float().eval()
    return model


def adapted(model: PreTrainedModel, **options: Any) -> Any:
    config = BottleneckConfig(
        task_type="FEATURE_EXTRACTION" if model.config.model_type in MASKED else "CAUSAL_LM",
        **{"reduction_factor": 4, **options},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return get_peft_model(model, config).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=IDS).logits
    return result


def first_input(model: Any, name: str) -> Tensor:
    """Return what the module `name` of a base reads in a forward pass."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = base.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    logits(model)
    handle.remove()
    return seen[0].reshape(2, 9, -1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [*SERIAL, *OTHERS])
def test_starts_as_the_base_and_has_an_effect(name: str, architecture: str) -> None:
    model = build(*{**SERIAL, **OTHERS}[name])
    expected = logits(model)
    wrapped = adapted(model, architecture=architecture)
    assert torch.equal(logits(wrapped), expected)
    disturbed(wrapped, 0.2)
    wrapped(input_ids=IDS).logits.square().sum().backward()
    gradients = {key: p.grad for key, p in wrapped.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients.values())
    assert len(gradients) == 2 * 4 * (2 if architecture == "houlsby" else 1)
    assert (logits(wrapped) - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("name", SERIAL)
def test_an_adapter_reads_the_sum_behind_its_half_of_the_block(name: str, attention: bool) -> None:
    """With y the hidden states behind attention (or the block), the adapted model has y + f(y) there."""
    model = build(*SERIAL[name])
    sites = {site.location: site for site in find_sites(model, BottleneckConfig(mh_adapter=True, leave_out=[1]))}
    block = sites[FEED_FORWARD].block
    behind = sites[FEED_FORWARD].residual if attention else f"{block.removesuffix('0')}1"
    y = first_input(model, behind)
    wrapped = adapted(model, mh_adapter=attention, output_adapter=not attention, leave_out=[1])
    disturbed(wrapped, 0.2)
    (layer,) = (module for module in wrapped.modules() if isinstance(module, BottleneckLayer))
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    change = up(torch.relu(down(y)))
    assert change.abs().max() > 1e-2
    assert torch.allclose(first_input(wrapped, behind), y + change, atol=1e-4, rtol=1e-4)


def test_an_unknown_block_is_an_error_that_names_the_known_ones() -> None:
    options = {**COMMON, "embedding_size": 32}
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("albert", **options))
    with pytest.raises(ValueError, match=r"AlbertForMaskedLM.*not known.*Llama.*LAYOUTS"):
        adapted(model)


def test_no_norm_behind_a_block_can_be_left_out() -> None:
    with pytest.raises(ValueError, match="normalises after each sub-block"):
        adapted(build(*OTHERS["bert"]), residual_before_ln=False, original_ln_after=False)
