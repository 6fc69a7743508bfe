"""Parameters and bytes of the model without data are those of the model that training loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ludwig_peft_plugin.estimate.storage import allocated_bytes, model_tensors

LINEAR = {"target_modules": "all-linear"}
NF4 = {"bits": 4, "bnb_4bit_quant_type": "nf4"}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"type": "lora", "r": 4, **LINEAR}},
    "lora on embeddings": {"adapter": {"type": "lora", "r": 4, "target_modules": ["q_proj", "embed_tokens"]}},
    "lora and a whole module": {"adapter": {"type": "lora", "r": 4, **LINEAR, "modules_to_save": ["lm_head"]}},
    "lora on one layer": {
        "adapter": {"type": "lora", "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
    },
    "dora": {"adapter": {"type": "dora", "r": 4}},
    "pissa": {"adapter": {"type": "lora", "r": 4, **LINEAR, "init_lora_weights": "pissa"}},
    "ia3": {"adapter": "ia3"},
    "vera": {"adapter": "vera"},
    "loha": {"adapter": "loha"},
    "tinylora": {"adapter": "tinylora"},
    "frod": {"adapter": "frod"},
    "shira": {"adapter": "shira"},
    "two of frod": {"adapter": None, "adapters": {"adapters": {"one": "frod", "other": "frod"}}},
    "full fine-tuning": {"adapter": None},
    "two adapters": {
        "adapter": None,
        "adapters": {"adapters": {"one": {"type": "lora", "r": 2}, "other": {"type": "lora", "r": 4}}},
    },
    "qlora": {"adapter": {"type": "qlora", "r": 4}},
    "qlora without double quantisation": {
        "adapter": {"type": "qlora", "r": 4},
        "quantization": {**NF4, "bnb_4bit_use_double_quant": False},
    },
    "qlora in fp4": {"adapter": {"type": "qlora", "r": 4}, "quantization": {"bits": 4, "bnb_4bit_quant_type": "fp4"}},
    "dora on 4 bits": {"adapter": {"type": "dora", "r": 4}, "quantization": NF4},
    "8 bits": {"adapter": {"type": "lora", "r": 4, **LINEAR}, "quantization": {"bits": 8}},
    "8-bit rows": {
        "adapter": {"type": "lora", "r": 4, **LINEAR},
        "quantization": {"backend": "torchao", "mode": "int8_weight_only"},
    },
    # A CPU keeps no transposed copies, which are for float8 units.
    "float8 rows": {
        "adapter": {"type": "lora", "r": 4, **LINEAR},
        "quantization": {"backend": "torchao", "mode": "float8", "float8_transposed_copy": False},
    },
    "bfloat16": {"adapter": {"type": "lora", "r": 4, **LINEAR}, "precision": "bfloat16"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_tensors_as_the_loaded_model(case: str, make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.meta_model import MetaLLM
    from ludwig_peft_plugin.model.llm import PeftLLM

    settings = dict(CASES[case])
    settings.setdefault("precision", "float32")  # that of a CPU
    config_obj = make_config("tiny-llama-python", **settings)
    real = PeftLLM(config_obj, _device="cpu")
    base = allocated_bytes(model_tensors(real.model))
    real.prepare_for_training()
    empty = MetaLLM(config_obj)

    assert sum(p.numel() for p in empty.trained.values()) == sum(
        p.numel() for p in real.model.parameters() if p.requires_grad
    )
    assert {name: (p.shape, p.dtype) for name, p in empty.model.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in real.model.named_parameters()
    }
    assert all(tensor.device.type == "meta" for tensor in model_tensors(empty.model))
    with_adapter = allocated_bytes(model_tensors(real.model))
    assert allocated_bytes(model_tensors(empty.model)) == with_adapter
    assert allocated_bytes(empty.adapter_tensors()) == with_adapter - base


def test_a_trained_adapter_brings_its_own_size(make_config: Any, tmp_path: Any) -> None:
    from ludwig_peft_plugin.adapters.io import save_adapter
    from ludwig_peft_plugin.estimate.meta_model import MetaLLM
    from ludwig_peft_plugin.model.llm import PeftLLM

    trained = PeftLLM(make_config(adapter={"type": "lora", "r": 3, **LINEAR}), _device="cpu")
    trained.prepare_for_training()
    save_adapter(trained.model, str(tmp_path / "adapter"))
    continued = {"type": "lora", "pretrained_adapter_weights": str(tmp_path / "adapter")}
    assert {p.shape for p in MetaLLM(make_config(adapter=continued)).trained.values()} == {
        p.shape for p in trained.model.parameters() if p.requires_grad
    }


def test_on_a_gpu_float8_weights_are_kept_twice_unless_told_otherwise(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.memory import Estimator

    twice, once = (
        Estimator(make_config(quantization={"backend": "torchao", "mode": "float8", "float8_transposed_copy": copy}))
        for copy in (True, False)
    )
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64)  # one byte each
    assert twice.base_bytes - once.base_bytes == weights
    assert twice.adapter_bytes == once.adapter_bytes


def test_precision_is_that_of_a_gpu(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.meta_model import MetaLLM, gpu_precision

    assert gpu_precision(make_config()) == torch.bfloat16
    assert gpu_precision(make_config(adapter=None)) == torch.float32
    assert gpu_precision(make_config(precision="float16")) == torch.float16
    assert MetaLLM(make_config()).model.dtype == torch.bfloat16


def test_nothing_to_train_is_an_error(make_config: Any) -> None:
    from ludwig_peft_plugin.errors import ModelError
    from ludwig_peft_plugin.estimate.meta_model import MetaLLM

    with pytest.raises(ModelError, match="layers_to_freeze_regex"):
        MetaLLM(make_config(trainer={"layers_to_freeze_regex": ".*"}))
