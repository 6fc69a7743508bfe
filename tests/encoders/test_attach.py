"""Every adapter type that fits an encoder, on tiny text encoders: its start, its gradients, the frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry

import ludwig_peft_plugin.adapters  # noqa: F401  (registers the types)
from ludwig_peft_plugin.adapters.base import AdapterConfig
from ludwig_peft_plugin.config.adapter_types import AdapterSelection
from ludwig_peft_plugin.encoders.build import attach_to_encoder
from ludwig_peft_plugin.encoders.config import fits, fitting_types, works_between_steps
from ludwig_peft_plugin.encoders.targets import ATTENTION
from ludwig_peft_plugin.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch, by frod

TYPES = [name for name in fitting_types() if issubclass(adapter_registry[name], AdapterConfig)]
OTHER_KINDS = ("roberta", "distilbert")
# The vectors have to divide the widths, 64 and 128.
SMALL: dict[str, dict[str, Any]] = {"vblora": {"vector_length": 16}}
Make = Callable[[str], Any]
INPUTS = {"input_ids": torch.tensor([[0, 6, 9, 12, 1, 2], [0, 7, 8, 5, 11, 1]])}
INPUTS["attention_mask"] = (INPUTS["input_ids"] != 2).long()


def section(name: str, kind: str = "bert") -> Any:
    options = dict(SMALL.get(name, {}))
    cls = adapter_registry[name]
    if kind != "bert" and cls.family == "reparameterisation" and "target_modules" in cls.model_fields:
        options["target_modules"] = "all-linear"
    return AdapterSelection().resolve({"type": name, **options})


def hidden(model: Any) -> torch.Tensor:
    state: torch.Tensor = model(**INPUTS)["last_hidden_state"]
    return state


def test_there_are_types_of_every_family_that_fits() -> None:
    assert {"lora", "dora"} <= set(TYPES)
    assert "qlora" not in TYPES
    assert all(not adapter_registry[name].soft_prompt for name in TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_only_the_adapter_trains_and_the_base_stays(name: str, text_model: Make) -> None:
    base = text_model("bert").eval()
    before = copy.deepcopy(base.state_dict())
    with torch.no_grad():
        expected = hidden(base)
    torch.manual_seed(1)
    model = attach_to_encoder(base, section(name), pooled=False).eval()
    cls = adapter_registry[name]
    if cls.starts_as_base:
        torch.testing.assert_close(hidden(model), expected, rtol=1e-4, atol=1e-5)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert not any("pooler" in key for key in trained)
    model.train()
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        (hidden(model) ** 2)[:, :, ::2].sum().backward()
        if step == 2:
            touched = [key for key, p in trained.items() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
            assert len(touched) > 0.8 * len(trained), sorted(set(trained) - set(touched))
        optimizer.step()
    assert not any(p.grad is not None for key, p in model.named_parameters() if key not in trained)
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(hidden(model), expected, rtol=0, atol=1e-4)
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                torch.testing.assert_close(hidden(model), expected, rtol=1e-4, atol=1e-5)
    restored = model.unload().state_dict()
    assert all(torch.equal(restored[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", TYPES)
def test_fits_other_architectures(name: str, text_model: Make) -> None:
    for kind in OTHER_KINDS:
        torch.manual_seed(1)
        model = attach_to_encoder(text_model(kind), section(name, kind), pooled=False)
        (hidden(model.train()) ** 2).sum().backward()
        with_gradient = [key for key, p in model.named_parameters() if p.grad is not None]
        assert with_gradient, kind
        assert all(model.get_parameter(key).requires_grad for key in with_gradient), kind


@pytest.mark.parametrize("kind", ["albert", "distilbert"])
def test_architectures_without_a_default_of_peft_have_one(kind: str, text_model: Make) -> None:
    model = attach_to_encoder(text_model(kind), section("lora"), pooled=False)
    adapted = {key.rpartition(".lora_A")[0].rpartition(".")[2] for key, _ in model.named_modules() if ".lora_A" in key}
    assert adapted == set(ATTENTION[kind])


def test_the_pooler_is_adapted_where_it_is_read(text_model: Make) -> None:
    adapter = AdapterSelection().resolve({"type": "lora", "target_modules": "all-linear"})
    model = attach_to_encoder(text_model("bert"), adapter, pooled=True)
    assert any("pooler" in key and p.requires_grad for key, p in model.named_parameters())
    unread = attach_to_encoder(text_model("bert"), adapter, pooled=False)
    assert unread.get_base_model().pooler is not None
    assert not any(p.requires_grad for p in unread.get_base_model().pooler.parameters())


def test_a_name_that_no_module_has_is_an_error_that_lists_bert_modules(text_model: Make) -> None:
    adapter = AdapterSelection().resolve({"type": "lora", "target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match=r"no module is called q_proj.*dense, key, query, value"):
        attach_to_encoder(text_model("bert"), adapter, pooled=False)


def test_a_16_bit_encoder_computes_in_float32(text_model: Make) -> None:
    model = attach_to_encoder(text_model("bert").bfloat16(), section("lora"), pooled=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert hidden(model).dtype == torch.float32


def test_a_class_says_whether_it_fits() -> None:
    assert fits(adapter_registry["lora"])
    assert fits(adapter_registry["adalora"])
    assert not fits(adapter_registry["prompt_tuning"])
    assert works_between_steps(adapter_registry["adalora"])
    assert not works_between_steps(adapter_registry["lora"])
