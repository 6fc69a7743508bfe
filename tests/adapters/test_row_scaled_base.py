"""Every adapter type on a base in 8-bit rows is what it is on the dequantised base, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from disturbed import disturbed
from ludwig.schema.llms.peft import adapter_registry
from transformers import LlamaForCausalLM, PreTrainedModel

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.adapters.methods.qlora import QLoraConfig
from ludwig_peft_plugin.config.adapter_types import capabilities
from ludwig_peft_plugin.errors import AdapterError
from ludwig_peft_plugin.export.merge import merged_copy
from ludwig_peft_plugin.model.dequantize import dequantize_model
from ludwig_peft_plugin.model.row_scaled_loading import LAYERS, RowScaledConfig

NEEDED: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 100},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50},
    "vblora": {"num_vectors": 16, "vector_length": 16},
    "waveft": {"n_frequency": 50},
}
"""Options without which a type does not fit layers this small."""

TRAINED = [
    name
    for name, cls in adapter_registry.items()
    if capabilities(cls).torchao_base
    and not getattr(cls, "soft_prompt", False)  # see test_soft_prompts.py
    and name not in ("bitfit", "layers")  # which train what is not quantised: see test_selective.py
]


def base(tiny: Any, mode: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = LlamaForCausalLM.from_pretrained(tiny.folder(), dtype=dtype, quantization_config=RowScaledConfig(mode))
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def section(name: str) -> Any:
    cls = adapter_registry[name]
    options = NEEDED.get(name, {})
    if name != "ln_tuning":
        options = {**options, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return cls(**{option: value for option, value in options.items() if option in cls.model_fields})


def attached(tiny: Any, model: PreTrainedModel, name: str) -> Any:
    torch.manual_seed(7)
    return attach_adapter(model, section(name)).eval()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", LAYERS)
@pytest.mark.parametrize("name", TRAINED)
def test_equals_the_adapter_on_the_dequantised_base(tiny: Any, name: str, mode: str, dtype: torch.dtype) -> None:
    plain = attached(tiny, dequantize_model(base(tiny, mode, dtype)), name)
    model = attached(tiny, base(tiny, mode, dtype), name)
    initial, expected = trained(model), trained(plain)
    assert initial.keys() == expected.keys()
    assert len(initial) > 0
    for key, value in initial.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key]), key
        assert value.dtype == torch.float32 or name == "ln_tuning"  # which trains layers of the base
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    start = tiny.logits(model)
    disturbed(model, 0.05)
    disturbed(plain, 0.05)
    assert (tiny.logits(model) - start).abs().max() > 1e-3
    assert torch.equal(tiny.logits(model), tiny.logits(plain))
    gradients, references = tiny.gradients(model), tiny.gradients(plain)
    for key, reference in references.items():
        torch.testing.assert_close(gradients[key], reference)


@pytest.mark.parametrize("mode", LAYERS)
@pytest.mark.parametrize("cls", [LoraConfig, QLoraConfig, DoraConfig])
def test_saves_loads_and_merges(tiny: Any, cls: Any, mode: str, tmp_path: Any) -> None:
    model = tiny.attach(cls(r=4, dropout=0.0, target_modules="all-linear"), base(tiny, mode))
    tiny.train(model)
    logits = tiny.logits(model)
    save_adapter(model, str(tmp_path))
    assert torch.equal(tiny.logits(load_adapter(base(tiny, mode), str(tmp_path), trainable=False)), logits)
    merged = merged_copy(model, torch.float32)
    assert not getattr(merged, "is_quantized", False)
    torch.testing.assert_close(tiny.logits(merged), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ia3", "loha", "oft", "vera"])
def test_ludwigs_types_merge(tiny: Any, name: str) -> None:
    model = attached(tiny, base(tiny, "float8"), name)
    disturbed(model, 0.05)
    torch.testing.assert_close(tiny.logits(merged_copy(model, torch.float32)), tiny.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", LAYERS)
def test_rounded_weights_cannot_be_trained_in_full(tiny: Any, mode: str) -> None:
    with pytest.raises(AdapterError, match="modules_to_save: 'q_proj' is quantised"):
        tiny.attach(LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"]), base(tiny, mode))
    with pytest.raises(AdapterError, match=r"target_parameters: .* is quantised"):
        tiny.attach(LoraConfig(target_parameters=["q_proj.weight"], dropout=0.0), base(tiny, mode))


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused(tiny: Any, init: str) -> None:
    with pytest.raises(AdapterError, match=f"init_lora_weights: {init}.*quantised"):
        tiny.attach(LoraConfig(init_lora_weights=init), base(tiny, "float8"))


def test_loftq_needs_bitsandbytes(tiny: Any) -> None:
    with pytest.raises(AdapterError, match="loftq needs a base quantised with backend: bitsandbytes"):
        tiny.attach(LoraConfig(init_lora_weights="loftq"), base(tiny, "float8"))


def test_eva_reads_through_it(tiny: Any) -> None:
    model = tiny.attach(LoraConfig(init_lora_weights="eva"), base(tiny, "float8"))
    torch.testing.assert_close(tiny.logits(model), tiny.logits(base(tiny, "float8")), rtol=0, atol=2e-6)
