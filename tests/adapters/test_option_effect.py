"""Every option of lora, qlora and dora changes something observable on a model, or is refused there."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ludwig.modules.optimization_modules import create_optimizer
from ludwig.schema.optimizers import AdamWOptimizerConfig
from pydantic import ValidationError

from ludwig_peft_plugin.adapters.io import save_adapter
from ludwig_peft_plugin.adapters.lora_fields import SECTIONS
from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.adapters.methods.qlora import QLoraConfig
from ludwig_peft_plugin.errors import AdapterError

ALL = (LoraConfig, QLoraConfig, DoraConfig)
QUERY, VALUE = "self_attn.q_proj", "self_attn.v_proj"
NOT_HERE = {
    "type": "chooses the class",
    "postprocessor": "read by the trainer once training is over, and tested there",
    **dict.fromkeys(SECTIONS.values(), "its options are tested in test_section_effect.py"),
}

Case = Callable[[Any, Any, Any], None]
cases: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def note(function: Case) -> Case:
        cases[name] = function
        return function

    return note


def parts(tiny: Any, model: Any) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in tiny.layers_of(model)}


def moved(tiny: Any, one: Any, other: Any) -> float:
    return float((tiny.logits(one) - tiny.logits(other)).abs().max())


@case("pretrained_adapter_weights")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    trained = tiny.attach(cls(r=4, dropout=0.0))
    tiny.train(trained)
    save_adapter(trained, str(tmp_path / "trained"))
    again = tiny.attach(cls(r=4, pretrained_adapter_weights=str(tmp_path / "trained")))
    assert torch.equal(tiny.logits(again), tiny.logits(trained))
    assert moved(tiny, again, tiny.attach(cls(r=4))) > 1e-2


@case("r")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    model = tiny.attach(cls(r=5))
    assert {(a.shape[0], b.shape[1]) for a, b in tiny.factors(model).values()} == {(5, 5)}


@case("alpha")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    weak, strong = (tiny.attach(cls(r=4, alpha=alpha, init_lora_weights="random")) for alpha in (1, 64))
    assert {layer.scaling["default"] for layer in tiny.layers_of(strong).values()} == {16.0}
    assert not tiny.differ(weak, strong)
    assert moved(tiny, weak, strong) > 1e-2


@case("dropout")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    def spread(dropout: float) -> float:
        model = tiny.attach(cls(r=4, alpha=64, dropout=dropout, init_lora_weights="random")).train()
        first, second = (model(input_ids=tiny.ids).logits.detach() for _ in range(2))
        return float((first - second).abs().max())

    assert spread(0.0) == 0
    assert spread(0.5) > 1e-2


def bias_effect(tiny: Any, cls: Any, name: str) -> None:
    def trained(value: str) -> set[str]:
        model = tiny.attach(cls(target_modules=["q_proj"], **{name: value}), tiny.base(attention_bias=True))
        return {p for p in tiny.gradients(model) if p.endswith("bias")}

    assert trained("none") == set()
    assert {p.split(".")[-3] for p in trained("lora_only")} == {"q_proj"}
    assert len(trained("lora_only")) == tiny.layers
    assert len(trained("all")) == 4 * tiny.layers


@case("bias_type")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    bias_effect(tiny, cls, "bias_type")


@case("bias")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    bias_effect(tiny, cls, "bias")


@case("target_modules")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert parts(tiny, tiny.attach(cls(target_modules=None))) == {"q_proj", "v_proj"}
    assert parts(tiny, tiny.attach(cls(target_modules=["k_proj", "down_proj"]))) == {"k_proj", "down_proj"}
    assert parts(tiny, tiny.attach(cls(target_modules="all-linear"))) == linear
    expression = tiny.layers_of(tiny.attach(cls(target_modules=r".*\.1\..*\.(q|k)_proj")))
    assert set(expression) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"}


@case("exclude_modules")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    wanted = {"target_modules": ["q_proj", "k_proj"]}
    assert parts(tiny, tiny.attach(cls(**wanted, exclude_modules=["k_proj"]))) == {"q_proj"}
    layers = tiny.layers_of(tiny.attach(cls(**wanted, exclude_modules=r".*layers\.0\..*")))
    assert len(layers) == 2 * (tiny.layers - 1)


@case("layers_to_transform")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    for wanted in ("all-linear", ["q_proj"]):
        for asked, expected in ((1, {"1"}), ([0, 2], {"0", "2"})):
            model = tiny.attach(cls(target_modules=wanted, layers_to_transform=asked))
            assert {name.split(".")[2] for name in tiny.layers_of(model)} == expected
            assert len(tiny.layers_of(model)) == len(expected) * (7 if wanted == "all-linear" else 1)


@case("layers_pattern")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    options = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    assert len(tiny.layers_of(tiny.attach(cls(**options, layers_pattern="layers")))) == 1
    with pytest.raises(AdapterError, match="layers_pattern: blocks"):
        tiny.attach(cls(**options, layers_pattern="blocks"))


@case("rank_pattern")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    options = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    model = tiny.attach(cls(**options, rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3}))
    ranks = {name: a.shape[0] for name, (a, _) in tiny.factors(model).items()}
    assert ranks[f"model.layers.0.{QUERY}"] == 2
    assert ranks[f"model.layers.0.{VALUE}"] == 8
    assert ranks[f"model.layers.1.{VALUE}"] == 3


@case("alpha_pattern")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    options = {"r": 4, "alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "random"}
    model, plain = tiny.attach(cls(**options, alpha_pattern={"q_proj": 64.0})), tiny.attach(cls(**options))
    scalings = {name: layer.scaling["default"] for name, layer in tiny.layers_of(model).items()}
    assert scalings[f"model.layers.0.{QUERY}"] == 16
    assert scalings[f"model.layers.0.{VALUE}"] == 1
    assert moved(tiny, model, plain) > 1e-2


@case("modules_to_save")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    model = tiny.attach(cls(modules_to_save=["lm_head"]))
    full = [name for name, g in tiny.gradients(model).items() if g.shape == (tiny.vocabulary, tiny.hidden)]
    assert full == ["base_model.model.lm_head.modules_to_save.default.weight"]
    assert not any(name.startswith("base_model.model.lm_head") for name in tiny.gradients(tiny.attach(cls())))


@case("trainable_token_indices")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    tokens = tiny.ids[0, :3].tolist()
    for value in (tokens, {"embed_tokens": tokens}):
        model = tiny.attach(cls(trainable_token_indices=value))
        before = model.get_input_embeddings()(torch.arange(tiny.vocabulary)).detach().clone()
        tiny.train(model, 2)
        after = model.get_input_embeddings()(torch.arange(tiny.vocabulary)).detach()
        changed = (before != after).any(dim=1).nonzero().flatten().tolist()
        assert changed == sorted(set(tokens))


@case("target_parameters")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    options = {"target_parameters": ["mlp.gate_proj.weight"], "target_modules": ["q_proj"], "dropout": 0.0}
    if cls is DoraConfig:
        with pytest.raises(ValidationError, match="target_parameters does not work with DoRA"):
            cls(**options)
        return
    model = tiny.attach(cls(**options))
    assert parts(tiny, model) == {"q_proj", "gate_proj"}
    assert any("gate_proj.lora_A" in name for name in tiny.gradients(model))
    tiny.train(model)
    assert moved(tiny, model, tiny.base()) > 1e-2


@case("layer_replication")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    model = tiny.attach(cls(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]]))
    layers = tiny.layers_of(model)
    assert len(layers) == 4
    copies = [layers[f"model.layers.{index}.{QUERY}"] for index in (1, 2)]
    assert copies[0].get_base_layer().weight is copies[1].get_base_layer().weight
    assert copies[0].lora_A["default"].weight is not copies[1].lora_A["default"].weight
    assert moved(tiny, model, tiny.base()) > 1e-2


@case("ensure_weight_tying")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    def tied_after_training(ensure: bool) -> bool:
        options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": ensure}
        model = tiny.attach(cls(**options), tiny.base(tie_word_embeddings=True))
        tiny.train(model, 1)
        heads = (model.get_input_embeddings(), model.get_output_embeddings())
        tables = [getattr(head, "modules_to_save", {"default": head})["default"].weight for head in heads]
        return torch.equal(*tables)

    assert tied_after_training(True)
    assert not tied_after_training(False)
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        tiny.attach(cls(ensure_weight_tying=True))


@case("use_rslora")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    options = {"r": 16, "alpha": 16, "init_lora_weights": "random"}
    stable, plain = tiny.attach(cls(**options, use_rslora=True)), tiny.attach(cls(**options))
    assert {layer.scaling["default"] for layer in tiny.layers_of(stable).values()} == {16 / math.sqrt(16)}
    assert not tiny.differ(stable, plain)
    assert moved(tiny, stable, plain) > 1e-2


@case("lora_bias")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    if cls is DoraConfig:
        with pytest.raises(ValidationError, match="lora_bias"):
            cls(lora_bias=True)
        return
    base = tiny.base(attention_bias=True)
    model = tiny.attach(cls(target_modules=["q_proj"], lora_bias=True), base)
    trained = tiny.gradients(model)
    assert sum(name.endswith("lora_B.default.bias") for name in trained) == tiny.layers
    adapter = cls(target_modules=["q_proj"], lora_bias=True)
    assert adapter.merge_obstacle(tiny.base(attention_bias=True)) is None
    assert "lora_bias" in str(adapter.merge_obstacle(tiny.base()))


@case("loraplus_lr_ratio")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    adapter = cls(loraplus_lr_ratio=16)
    llm = torch.nn.Module()
    llm.model = tiny.attach(adapter)
    llm.config_obj = SimpleNamespace(adapter=adapter)
    optimizer = create_optimizer(llm, AdamWOptimizerConfig(), 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in llm.named_parameters() if p.requires_grad}
    assert all(rate == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3) for name, rate in by_name.items())
    assert any("lora_B" in name for name in by_name)


@case("init_lora_weights")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    plain = tiny.attach(cls(r=4))
    for name in ("random", "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "lora_ga", "corda"):
        assert tiny.differ(tiny.attach(cls(r=4, init_lora_weights=name)), plain), name
    assert not tiny.differ(tiny.attach(cls(r=4, init_lora_weights=True)), plain)


@case("use_dora")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    trained = tiny.gradients(tiny.attach(cls(use_dora=True)))
    assert sum("lora_magnitude_vector" in name for name in trained) == 2 * tiny.layers
    assert not any("lora_magnitude_vector" in name for name in tiny.gradients(tiny.attach(cls())))


@case("ephemeral_gpu_offload")
def _(tiny: Any, cls: Any, tmp_path: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(AdapterError, match="ephemeral_gpu_offload: true needs a GPU"):
            tiny.attach(cls(ephemeral_gpu_offload=True))


PAIRS = [(cls, name) for cls in ALL for name in cls.model_fields if name not in NOT_HERE]


@pytest.mark.parametrize(("cls", "name"), PAIRS, ids=[f"{cls.type}-{name}" for cls, name in PAIRS])
def test_option_takes_effect(cls: Any, name: str, tiny: Any, tmp_path: Any) -> None:
    cases[name](tiny, cls, tmp_path)


def test_every_option_has_a_case() -> None:
    assert {name for _, name in PAIRS} == set(cases)
