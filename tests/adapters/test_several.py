"""Several adapters on one base: each as if it were alone, switched, added up, merged, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from ludwig_peft_plugin.adapters.io import save_adapter
from ludwig_peft_plugin.adapters.several.active import active_names, parameters_of, set_adapter, use_adapter
from ludwig_peft_plugin.adapters.several.attach import attach_adapters, load_adapters, save_adapters
from ludwig_peft_plugin.adapters.several.merge import combinations
from ludwig_peft_plugin.config.adapters_section import AdaptersConfig
from ludwig_peft_plugin.errors import AdapterError

LORA = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}


def section(adapters: dict[str, Any], **options: Any) -> AdaptersConfig:
    return AdaptersConfig.model_validate({"adapters": adapters, **options})


@pytest.fixture
def folders(tiny, tmp_path: Path) -> dict[str, str]:
    """Two trained adapters, `first` (LoRA) and `second` (of another rank and other modules)."""
    from ludwig_peft_plugin.config.adapter_types import AdapterSelection

    made = {}
    for seed, (name, options) in enumerate(
        {"first": LORA, "second": {**LORA, "r": 2, "target_modules": ["q_proj"]}}.items()
    ):
        model = tiny.attach(AdapterSelection().resolve(options), seed=seed)
        tiny.train(model, 2 + seed)
        made[name] = str(tmp_path / name)
        save_adapter(model, made[name])
    return made


def pretrained(folders: dict[str, str]) -> dict[str, Any]:
    second = {**LORA, "r": 2, "target_modules": ["q_proj"]}
    return {
        "first": {**LORA, "pretrained_adapter_weights": folders["first"]},
        "second": {**second, "pretrained_adapter_weights": folders["second"]},
    }


def alone(tiny, folder: str) -> torch.Tensor:
    return tiny.logits(PeftModel.from_pretrained(tiny.base(), folder))


def test_each_adapter_answers_as_if_it_were_alone(tiny, folders):
    model = attach_adapters(tiny.base(), section(pretrained(folders)))
    base = tiny.logits(tiny.base())
    assert active_names(model) == ["first"]
    assert torch.equal(tiny.logits(model), alone(tiny, folders["first"]))
    with use_adapter(model, "second"):
        assert torch.equal(tiny.logits(model), alone(tiny, folders["second"]))
    with use_adapter(model, None):
        assert active_names(model) == []
        assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), alone(tiny, folders["first"]))
    set_adapter(model, "second")
    assert torch.equal(tiny.logits(model), alone(tiny, folders["second"]))


def test_using_another_adapter_leaves_what_is_trained_as_it_was(tiny, folders):
    model = attach_adapters(tiny.base(), section(pretrained(folders), active=["first", "second"], trained=["second"]))
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert before
    assert all("second" in name.split(".") for name in before)
    for other in ("first", None):
        with use_adapter(model, other):
            assert other is None or not any(parameter.requires_grad for parameter in model.parameters())
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
        assert active_names(model) == ["first", "second"]


def test_only_the_trained_adapter_changes_and_effects_add_up(tiny, folders):
    model = attach_adapters(tiny.base(), section(pretrained(folders), active=["first", "second"], trained=["second"]))
    frozen = tiny.weights(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, tiny.hidden, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = layer(x)
        with use_adapter(model, "first"):
            first = layer(x)
        with use_adapter(model, "second"):
            second = layer(x)
        with use_adapter(model, None):
            neither = layer(x)
    assert torch.allclose(both, first + second - neither, atol=1e-6)
    before = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    tiny.train(model, 2)
    assert all(torch.equal(frozen[name], weight) for name, weight in tiny.weights(model).items())
    assert any(
        not torch.equal(before[name], parameter) for name, parameter in model.named_parameters() if name in before
    )


def test_new_adapters_start_as_a_single_one_does(tiny):
    torch.manual_seed(5)
    model = attach_adapters(tiny.base(), section({"one": LORA, "two": {"type": "dora", "r": 2}}))
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.base()))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    tiny.train(model)
    changed = tiny.logits(model)
    with use_adapter(model, "two"):
        assert torch.allclose(tiny.logits(model), tiny.logits(tiny.base()), atol=1e-5)
    assert not torch.allclose(changed, tiny.logits(tiny.base()), atol=1e-2)


@pytest.mark.parametrize("active", ["second", ["first", "second"], "mix"])
def test_saved_adapters_load_to_the_same_logits(tiny, folders, tmp_path, active):
    merge = {"name": "mix", "sources": ["first", "second"], "weights": [0.3, 0.9], "combination_type": "cat"}
    chosen = section(pretrained(folders), active=active, merge=merge)
    model = attach_adapters(tiny.base(), chosen)
    tiny.train(model)
    save_adapters(model, chosen, str(tmp_path / "saved"))
    loaded = load_adapters(tiny.base(), chosen, str(tmp_path / "saved"), trainable=False)
    assert active_names(loaded) == active_names(model)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name in ("first", "second", "mix"):
        with use_adapter(model, name), use_adapter(loaded, name):
            assert torch.equal(tiny.logits(model), tiny.logits(loaded)), name
            assert torch.equal(tiny.logits(model), alone(tiny, str(tmp_path / "saved" / name)))
    assert torch.equal(tiny.logits(model), tiny.logits(loaded))
    again = load_adapters(loaded, chosen, str(tmp_path / "saved"), trainable=True)
    trained = {part for name, p in again.named_parameters() if p.requires_grad for part in name.split(".")}
    assert trained & {"first", "second", "mix"} == set([active] if isinstance(active, str) else active)


def test_a_merge_is_the_weighted_sum_and_follows_its_sources(tiny, folders, tmp_path):
    merge = {"sources": ["first", "second"], "weights": [0.5, -2.0], "combination_type": "cat"}
    chosen = section(pretrained(folders), merge=merge)
    model = attach_adapters(tiny.base(), chosen)

    def change(name: str) -> torch.Tensor:
        layer = model.get_base_model().model.layers[1].self_attn.q_proj
        return layer.get_delta_weight(name).detach()

    assert torch.allclose(change("merged"), 0.5 * change("first") - 2.0 * change("second"), atol=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    old = change("merged")
    tiny.train(model)
    save_adapters(model, chosen, str(tmp_path / "saved"))
    assert not torch.allclose(change("merged"), old, atol=1e-4)
    assert torch.allclose(change("merged"), 0.5 * change("first") - 2.0 * change("second"), atol=1e-6)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_random_merges_repeat(tiny, folders):
    merge = {"sources": ["first"], "combination_type": "dare_linear", "density": 0.5}
    one, other = (attach_adapters(tiny.base(), section(pretrained(folders), merge=merge)) for _ in range(2))
    with use_adapter(one, "merged"), use_adapter(other, "merged"):
        assert torch.equal(tiny.logits(one), tiny.logits(other))
        assert not torch.equal(tiny.logits(one), alone(tiny, folders["first"]))


def test_ways_to_merge_are_those_of_the_installed_peft():
    from peft.utils.peft_types import PeftType

    assert {"linear", "cat", "svd", "ties", "dare_ties"} <= set(combinations(PeftType.LORA))
    assert combinations(PeftType.IA3) == ("linear",)
    assert combinations(PeftType.ADALORA) == ()
    assert combinations(PeftType.PREFIX_TUNING) == ()


def test_an_eva_start_reads_the_data_and_shares_the_base(tiny):
    chosen = section({"plain": LORA, "eva": {**LORA, "init_lora_weights": "eva"}}, active="eva")
    assert chosen.needs_data
    model = attach_adapters(tiny.base(), chosen, batches=tiny.batches)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    # EVA's rows of A are orthonormal directions of the activations.
    a = layer.lora_A["eva"].weight.detach()
    assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.base()))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_are_shared(tiny, bits):
    base = tiny.base(bits)
    chosen = section({"one": LORA, "two": {**LORA, "type": "qlora"}}, active="two")
    model = attach_adapters(base, chosen)
    tiny.train(model)
    with use_adapter(model, "one"):
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.base(bits)))
    assert not torch.allclose(tiny.logits(model), tiny.logits(tiny.base(bits)), atol=1e-3)


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        ({"one": LORA, "two": {"type": "ia3"}}, {}, "two.*different peft types"),
        ({"one": LORA, "two": {**LORA, "init_lora_weights": "pissa"}}, {}, "two.*pissa changes the base's weights"),
        ({"mlp": LORA}, {}, "mlp: the base has a module of this name"),
        ({"one": {**LORA, "target_modules": ["wrong"]}}, {}, "one: .*wrong"),
        ({"one": LORA, "two": {**LORA, "r": 2}}, {"merge": {"sources": ["one", "two"]}}, "merge: one, two cannot be"),
    ],
)
def test_what_cannot_share_a_base_is_refused(tiny, adapters, options, message):
    with pytest.raises(AdapterError, match=f"adapters.*{message}"):
        attach_adapters(tiny.base(), section(adapters, **options))


def test_choosing_an_unknown_adapter_names_those_there_are(tiny, folders):
    model = attach_adapters(tiny.base(), section(pretrained(folders)))
    with pytest.raises(AdapterError, match=r"'third'.*It has first, second"), use_adapter(model, "third"):
        pass
    with pytest.raises(AdapterError, match="has no adapter"):
        active_names(tiny.base())


def test_a_missing_folder_names_the_adapter(tiny, folders, tmp_path):
    with pytest.raises(AdapterError, match=r"adapters.adapters.first: .*does not exist"):
        load_adapters(tiny.base(), section(pretrained(folders)), str(tmp_path / "nothing"), trainable=False)


@pytest.mark.parametrize("how", ["svd", "cat", "ties_svd"])
def test_a_merge_keeps_no_more_than_its_own_numbers(tiny, folders, how):
    merge = {"name": "mix", "sources": ["first", "second"], "combination_type": how}
    model = attach_adapters(tiny.base(), section(pretrained(folders), merge=merge))
    found = parameters_of(model, "mix")
    assert found
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in found)
