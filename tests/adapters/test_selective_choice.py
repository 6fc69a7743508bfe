"""Which parameters the options choose, on several architectures, and what is said where there is nothing to choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ludwig.error import ConfigValidationError
from ludwig.schema.llms.peft import adapter_registry
from peft import PeftType, get_peft_model
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ludwig_peft_plugin.adapters.base import FAMILIES
from ludwig_peft_plugin.adapters.peft_type import register_tuner
from ludwig_peft_plugin.adapters.selective import BitFitConfig, SelectedLayersConfig
from ludwig_peft_plugin.adapters.selective.config import norm_names
from ludwig_peft_plugin.adapters.selective.model import BitFitModel, SelectedLayersModel
from ludwig_peft_plugin.config.adapter_types import AdapterSelection
from ludwig_peft_plugin.errors import AdapterError

SIZE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = ("bitfit", "ln_tuning", "layers", "full")


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZE, max_position_embeddings=32)).requires_grad_(False).eval()


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).requires_grad_(False)


def trained(model: Any) -> set[str]:
    """Return the trained parameters by their names in the base."""
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad]
    parts = [name.removeprefix("base_model.model.").split(".default.") for name in names]
    return {f"{module.rpartition('.')[0]}.{own}" for module, own in parts}


def attach(tiny: Any, kind: str, base: Any, **options: Any) -> Any:
    return tiny.attach(adapter_registry[kind](**options), base)


def names_of(base: Any, *parts: str) -> set[str]:
    return {name for name, _ in base.named_parameters(remove_duplicate=False) if any(part in name for part in parts)}


@pytest.mark.parametrize("kind", KINDS)
def test_class_data(kind: str) -> None:
    cls: Any = adapter_registry[kind]
    assert cls.family == "selective"
    assert cls.family in FAMILIES
    assert "https://arxiv.org/abs/" in cls.paper
    assert cls.good_for
    assert cls.learning_rate > 0
    assert cls.mergeable
    assert (cls.encoder, cls.several, cls.quantized_base) == ((kind != "full",) * 3)
    assert cls.name()
    assert cls.description()


def test_biases_of_qwen2_are_those_of_queries_keys_and_values(tiny: Any) -> None:
    base = Qwen2ForCausalLM(Qwen2Config(**SIZE, num_key_value_heads=2))
    expected = names_of(base, ".bias")
    assert len(expected) == 3 * 3
    assert trained(attach(tiny, "bitfit", base)) == expected


def test_biases_by_module(tiny: Any) -> None:
    for wanted in (["c_fc", "ln_1"], r".*\.(c_fc|ln_1)"):
        base = gpt2()
        expected = names_of(base, "c_fc.bias", "ln_1.bias")
        assert len(expected) == 6
        assert trained(attach(tiny, "bitfit", base, target_modules=wanted)) == expected


def test_created_biases_are_those_linear_layers_lack(tiny: Any) -> None:
    base = Qwen2ForCausalLM(Qwen2Config(**SIZE, num_key_value_heads=2))
    expected = {name.replace(".weight", ".bias") for name in names_of(base, "_proj.weight")}
    assert len(expected) == 3 * 7
    assert trained(attach(tiny, "bitfit", base, create=True)) == expected
    narrow = attach(tiny, "bitfit", tiny.base(), create=True, target_modules=["up_proj"])
    assert len(trained(narrow)) == tiny.layers
    # GPT-2 lacks none but that of the output head, which gets none.
    assert trained(attach(tiny, "bitfit", gpt2(), create=True)) == names_of(gpt2(), ".bias")
    assert adapter_registry["bitfit"](create=True).merge_obstacle(gpt2()) is None


def test_norms_are_found_by_their_class(tiny: Any) -> None:
    base = Qwen3ForCausalLM(Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=8))
    expected = names_of(base, "layernorm.weight", "_norm.weight", "model.norm.weight")
    assert len(expected) == 3 * 4 + 1
    assert trained(attach(tiny, "ln_tuning", base)) == expected
    assert {f"{name}.weight" for name in norm_names(base.cpu())} >= {"model.norm.weight"}


def test_norms_by_name_and_without_some(tiny: Any) -> None:
    model = attach(tiny, "ln_tuning", tiny.base(), target_modules=["input_layernorm"])
    assert trained(model) == names_of(tiny.base(), "input_layernorm")
    model = attach(tiny, "ln_tuning", tiny.base(), exclude_modules=["model.norm"])
    assert trained(model) == names_of(tiny.base(), "layernorm")
    model = attach(tiny, "ln_tuning", tiny.base(), target_modules=r".*\.1\..*layernorm")
    assert trained(model) == names_of(tiny.base(), "1.input_layernorm", "1.post_attention_layernorm")


@pytest.mark.parametrize(
    ("options", "layers"),
    [({}, (1, 2)), ({"last": 1}, (2,)), ({"first": 2}, (0, 1)), ({"range": [1, 2]}, (1,)), ({"last": 3}, (0, 1, 2))],
)
def test_layers(tiny: Any, options: dict[str, Any], layers: tuple[int, ...]) -> None:
    expected = names_of(tiny.base(), *(f"layers.{number}." for number in layers))
    assert trained(attach(tiny, "layers", tiny.base(), **options)) == expected
    with_head = attach(tiny, "layers", tiny.base(), include_head=True, **options)
    assert trained(with_head) == expected | {"lm_head.weight"}


def test_a_tied_weight_is_chosen_with_all_its_names(tiny: Any) -> None:
    for pattern in ("lm_head.weight", ".*embed_tokens.*"):
        base = tiny.base(tie_word_embeddings=True)
        model = attach(tiny, "layers", base, pattern=pattern)
        assert trained(model) == {"lm_head.weight", "model.embed_tokens.weight"}
        assert len([parameter for parameter in model.parameters() if parameter.requires_grad]) == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("bitfit", (".bias",)), ("ln_tuning", ("LayerNorm",)), ("layers", ("encoder.layer.1.", "encoder.layer.2."))],
)
def test_text_encoders(tiny: Any, kind: str, expected: tuple[str, ...]) -> None:
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    before = bert()(**inputs).last_hidden_state
    model = attach(tiny, kind, bert())
    assert trained(model) == names_of(bert(), *expected)
    torch.testing.assert_close(model(**inputs).last_hidden_state, before, rtol=0, atol=0)
    model(**inputs).last_hidden_state.square().mean().backward()
    unused = {name for name in trained(model) if name.startswith("pooler.")}
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len([grad for grad in grads if grad is None]) == len(unused)


def test_pefts_own_door_builds_the_same(tiny: Any) -> None:
    """Without our checks: as several adapters are added, and as other libraries would."""
    config = adapter_registry["layers"](last=1).to_config(task_type="CAUSAL_LM")
    assert trained(get_peft_model(tiny.base(), config)) == names_of(tiny.base(), "layers.2.")


def test_types_are_registered_with_peft_once() -> None:
    assert PeftType("BITFIT") is PeftType.BITFIT
    assert {"BITFIT", "LAYERS"} <= {member.value for member in PeftType}
    register_tuner("bitfit", BitFitConfig, BitFitModel)
    with pytest.raises(KeyError, match="already"):
        register_tuner("bitfit", SelectedLayersConfig, SelectedLayersModel)


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("bitfit", {}, ["no biases", "(llama)", "adapter.create: true", "ln_tuning, ia3 or lora", "Qwen2"]),
        ("bitfit", {"target_modules": ["up_proj"]}, ["the modules of adapter.target_modules have no biases"]),
        ("bitfit", {"create": True, "target_modules": ["up_prj"]}, ["'up_prj' matches no module", "up_proj"]),
        ("bitfit", {"create": True, "target_modules": "up"}, ["'up' matches no module"]),
        ("ln_tuning", {"target_modules": ["up_proj"]}, ["is a Linear", "input_layernorm", "norm", "layers"]),
        (
            "ln_tuning",
            {"exclude_modules": ["up_proj"]},
            ["exclude_modules: 'up_proj' matches no normalisation"],
        ),
        ("ln_tuning", {"target_modules": "all-linear"}, ["'all-linear' leaves no normalisation", "input_layernorm"]),
        ("ln_tuning", {"target_modules": ["nrm"]}, ["leaves no normalisation", "norm"]),
        ("layers", {"last": 4}, ["adapter.last: 4", "3 layers"]),
        ("layers", {"first": 9}, ["adapter.first: 9", "3 layers"]),
        ("layers", {"range": [2, 5]}, ["adapter.range: 5", "3 layers"]),
        ("layers", {"pattern": "mlp"}, ["'mlp' matches no full parameter name", "model.embed_tokens.weight", ".*"]),
    ],
)
def test_nothing_to_train(tiny: Any, kind: str, options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(AdapterError) as caught:
        attach(tiny, kind, tiny.base(), **options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert len(str(caught.value)) < 500


def test_nothing_to_train_in_an_encoder(tiny: Any) -> None:
    with pytest.raises(AdapterError, match="include_head: this model has no output head"):
        attach(tiny, "layers", bert(), include_head=True)
    with pytest.raises(AdapterError, match=r"no list of layers.*use pattern"):
        SelectedLayersConfig(last=1).resolve(torch.nn.Linear(2, 2))
    with pytest.raises(AdapterError, match="no normalisation with weights"):
        norm_names(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("layers", {"last": 1, "first": 1}, r"adapter\.first: last says already.*keep one of last, first"),
        ("layers", {"range": [2, 2]}, r"adapter\.range: \[2, 2\] is empty"),
        ("layers", {"range": [2]}, r"adapter\.range"),
        ("layers", {"pattern": "("}, r"adapter\.pattern: '\(' is not a regular expression"),
        ("layers", {"pattern": ".*", "include_head": True}, r"adapter\.include_head has no effect beside pattern"),
        ("ln_tuning", {"target_modules": "("}, r"adapter\.target_modules: '\(' is not a regular expression"),
        ("bitfit", {"target_modules": []}, r"adapter\.target_modules"),
    ],
)
def test_options_that_contradict(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigValidationError, match=message):
        AdapterSelection().resolve({"type": kind, **options})
