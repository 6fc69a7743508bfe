"""A merged copy has the trained model's logits, whatever is under and in the adapter, and leaves that model alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import disturbed
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export.merge import Rounding, merged_copy
from ludwig_peft_plugin.export.merged import merged_model
from ludwig_peft_plugin.export.verify import logits_of

TOKENS = [torch.arange(5, 45).unsqueeze(0), torch.arange(200, 230).unsqueeze(0)]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "bias": {"bias": "all", "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "pissa": {"init_lora_weights": "pissa"},
}


def difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))


CASES = [
    *(("lora", bits, tied) for bits in (None, 4, 8) for tied in (False, True)),
    *((kind, None, True) for kind in KINDS if kind != "lora"),
    # Not DoRA on 8 bits: PEFT's layer loses the scales of bitsandbytes' 8-bit weights on the CPU.
    ("dora", 4, False),
    ("embeddings", 4, True),
    ("head", 8, True),
    ("replicated", 4, True),
]


@pytest.mark.parametrize(("kind", "bits", "tied"), CASES)
def test_merged_equals_trained(make_llm: Any, tmp_path: Path, kind: str, bits: int | None, tied: bool) -> None:
    model = disturbed(make_llm(bits=bits, tied=tied, **KINDS[kind]).model, 0.02)
    trained = logits_of(model, TOKENS)
    with warnings.catch_warnings(action="ignore"), model.disable_adapter():
        assert difference(logits_of(model, TOKENS), trained) > 0.05

    merged = merged_copy(model, torch.float32)

    assert difference(logits_of(merged, TOKENS), trained) < 1e-4
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(logits_of(reloaded, TOKENS), trained) < 1e-4
    assert not hasattr(reloaded.config, "quantization_config")
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.float32}
    # An adapter on one of two tied embeddings unties them; trained tokens are of both.
    assert reloaded.config.tie_word_embeddings is (tied and kind not in ("embeddings", "head"))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_live_model_is_as_it_was(make_llm: Any, bits: int | None) -> None:
    llm = make_llm(bits=bits, tied=True)
    model = llm.model
    model.base_model.model.model.layers[0].eval()
    next(parameter for parameter in model.parameters() if parameter.requires_grad).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    trained = logits_of(model, TOKENS)
    random_state = torch.get_rng_state()

    merged = merged_model(llm)

    assert isinstance(model, PeftModel)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert flags == {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()}
    assert modes == [module.training for module in model.modules()]
    assert difference(logits_of(model, TOKENS), trained) == 0.0
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in shared for parameter in merged.parameters())
    assert merged.generation_config.eos_token_id == 0
    assert torch.equal(torch.get_rng_state(), random_state)


def test_merge_is_rounded_once(make_llm: Any) -> None:
    model = make_llm(bits=4).model
    exact = dict(merged_copy(model, torch.float32).named_parameters())
    rounded = dict(merged_copy(model, torch.bfloat16).named_parameters())
    assert all(torch.equal(rounded[name], exact[name].to(torch.bfloat16)) for name in exact)


def test_share_of_the_change_that_rounding_leaves() -> None:
    weight = torch.tensor([1.0, 1.0])
    rounding = Rounding()
    assert rounding.kept is None
    # Neighbours of 1 in bfloat16 are 2**-7 above: the first change is lost, the second is kept.
    exact = weight + torch.tensor([2.0**-9, 2.0**-7])
    rounding.add(weight, exact, exact.bfloat16())
    assert rounding.kept == pytest.approx(16 / 17)


def test_without_adapter_it_is_a_copy(make_llm: Any) -> None:
    llm = make_llm(adapter=False, tied=True)
    merged = merged_model(llm)
    assert merged is not llm.model
    assert difference(logits_of(merged, TOKENS), logits_of(llm.model, TOKENS)) == 0.0


def test_nothing_patched_into_the_live_model_comes_along(make_llm: Any) -> None:
    model = make_llm().model
    layer = model.base_model.model.model.layers[0]
    layer.mlp.forward = lambda x: x
    merged = merged_copy(model, torch.float32)
    assert "forward" not in merged.model.layers[0].mlp.__dict__


def test_a_weight_that_overflows_is_an_error(make_llm: Any) -> None:
    model = make_llm().model
    model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"not finite in torch\.float16"):
        merged_copy(model, torch.float16)


def test_a_bias_without_a_place_in_the_base_is_an_error(make_llm: Any) -> None:
    model = make_llm(lora_bias=True, target_modules=["up_proj"]).model
    with pytest.raises(ExportError, match=r"up_proj cannot be merged: .*bias"):
        merged_copy(model, torch.float32)


def test_an_adapter_that_is_merged_already_is_an_error(make_llm: Any) -> None:
    model = make_llm().model
    model.merge_adapter()
    with pytest.raises(ExportError, match="unmerge_adapter"):
        merged_copy(model, torch.float32)


def test_prompt_learning_cannot_be_merged(make_llm: Any) -> None:
    from peft import PromptTuningConfig, get_peft_model

    base = make_llm(adapter=False).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ExportError, match="format: adapter"):
        merged_copy(model, torch.float32)
