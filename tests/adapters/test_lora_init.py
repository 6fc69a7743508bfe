"""Initialisations: what A and B are, that the model starts as the base, and that a seed decides."""

from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from transformers import GPT2Config, GPT2LMHeadModel

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.initial import initial_adapter
from ludwig_peft_plugin.adapters.lora_init import METHODS
from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.errors import AdapterError

CHANGING = [name for name, method in METHODS.items() if method.changes_base] + ["pissa_niter_8"]
UNQUANTISED = [name for name, method in METHODS.items() if method.quantized != "only"]
STARTS_AS_BASE = [name for name in UNQUANTISED if name != "random"]
ALL_LINEAR = {"r": 4, "dropout": 0.0, "target_modules": "all-linear"}


def pair(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((LoraConfig, name) for name in STARTS_AS_BASE),
        *((DoraConfig, name) for name in STARTS_AS_BASE if name != "mica"),
    ],
)
def test_the_adapted_model_starts_as_the_base(tiny: Any, cls: Any, name: str) -> None:
    model = tiny.attach(cls(**ALL_LINEAR, init_lora_weights=name))
    torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.base()), rtol=0, atol=2e-6)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", UNQUANTISED)
def test_the_seed_decides(tiny: Any, name: str) -> None:
    first, second, other = (
        tiny.attach(LoraConfig(**ALL_LINEAR, init_lora_weights=name), seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    # LoRA-GA finds its singular vectors with a randomised method.
    drawn = name in ("default", "random", "gaussian", "orthogonal", "lora_ga")
    assert drawn == any(not torch.equal(first[key], other[key]) for key in first)


def test_random_is_not_the_base(tiny: Any) -> None:
    model = tiny.attach(LoraConfig(**ALL_LINEAR, init_lora_weights="random"))
    assert (tiny.logits(model) - tiny.logits(tiny.base())).abs().max() > 1e-2


def test_pissa_takes_the_largest_singular_values(tiny: Any) -> None:
    base = tiny.base()
    for name, layer in tiny.layers_of(tiny.attach(LoraConfig(**ALL_LINEAR, init_lora_weights="pissa"))).items():
        a, b = pair(layer)
        values = torch.linalg.svdvals(base.get_submodule(name).weight)
        update, rest = layer.scaling["default"] * b @ a, layer.get_base_layer().weight
        torch.testing.assert_close(torch.linalg.svdvals(update)[:4], values[:4])
        torch.testing.assert_close(torch.linalg.svdvals(rest)[: len(values) - 4], values[4:])


def test_olora_has_orthonormal_columns(tiny: Any) -> None:
    for layer in tiny.layers_of(tiny.attach(LoraConfig(**ALL_LINEAR, init_lora_weights="olora"))).values():
        _, b = pair(layer)
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)


def test_orthogonal_factors_cancel(tiny: Any) -> None:
    for layer in tiny.layers_of(tiny.attach(LoraConfig(**ALL_LINEAR, init_lora_weights="orthogonal"))).values():
        a, b = pair(layer)
        assert b.abs().max() > 1e-3
        assert (b @ a).abs().max() < 1e-6


def test_mica_trains_a_alone_and_takes_the_smallest_directions(tiny: Any) -> None:
    model, base = tiny.attach(LoraConfig(**ALL_LINEAR, init_lora_weights="mica")), tiny.base()
    assert all("lora_A" in name for name in tiny.gradients(model))
    name, layer = next(iter(tiny.layers_of(model).items()))
    a, b = pair(layer)
    assert not a.any()
    left = torch.linalg.svd(base.get_submodule(name).weight, full_matrices=False)[0][:, -4:]
    torch.testing.assert_close((left.T @ b).abs(), torch.eye(4), rtol=0, atol=1e-3)


def layer_inputs(tiny: Any, name: str) -> torch.Tensor:
    """Return the inputs of a layer of the base at the target tokens of the first batch, shape [tokens, in]."""
    seen: list[torch.Tensor] = []
    base, batch = tiny.base(), next(tiny.batches())
    base.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return seen[0][batch["labels"] != -100]


def test_eva_takes_the_principal_components_of_the_inputs(tiny: Any) -> None:
    config = LoraConfig(
        r=3, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights="eva", eva_config={"rho": 1.0}
    )
    model = tiny.attach(config)
    for name, layer in tiny.layers_of(model).items():
        a, b = pair(layer)
        inputs = layer_inputs(tiny, name)
        inputs = inputs - inputs.mean(dim=0)
        components = torch.linalg.svd(inputs, full_matrices=False)[2][:3]
        torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=0, atol=1e-4)
        assert (a[0] @ components[0]).abs() > 0.99
        # PEFT's randomised method mixes components of nearly equal variance; what they explain together is the same.
        assert (inputs @ a.T).square().sum() > 0.98 * (inputs @ components.T).square().sum()
        assert not b.any()


def test_eva_moves_ranks_and_keeps_their_sum(tiny: Any) -> None:
    model = tiny.attach(LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva"))
    ranks = [layer.r["default"] for layer in tiny.layers_of(model).values()]
    assert sum(ranks) == 4 * 7 * tiny.layers
    assert len(set(ranks)) > 1
    assert max(ranks) <= 8


def test_eva_tells_that_the_batches_have_too_few_tokens(tiny: Any) -> None:
    with pytest.raises(AdapterError, match=r"eva needs 128 tokens in a batch .*largest has 66 .*batch_size"):
        tiny.attach(LoraConfig(r=64, init_lora_weights="eva"))


def test_corda_depends_on_the_data_and_not_on_padding(tiny: Any) -> None:
    def factors(batches: Any) -> torch.Tensor:
        torch.manual_seed(7)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="corda")
        model = attach_adapter(tiny.base(), config, batches=batches)
        a, b = pair(next(iter(tiny.layers_of(model).values())))
        return b @ a

    def padded() -> Any:
        for batch in tiny.batches():
            yield {name: torch.nn.functional.pad(tensor, (0, 9)) for name, tensor in batch.items()}

    plain = factors(tiny.batches)
    torch.testing.assert_close(factors(padded), plain)
    assert not torch.allclose(factors(lambda: list(tiny.batches())[:1]), plain)


def test_lora_ga_follows_the_gradient(tiny: Any) -> None:
    config = LoraConfig(
        r=4, target_modules=["o_proj"], init_lora_weights="lora_ga", lora_ga_config={"scale": "unit"}, dropout=0.0
    )
    model = tiny.attach(config)
    base = tiny.base()
    weight = base.get_submodule("model.layers.1.self_attn.o_proj").weight.requires_grad_(True)
    base(**next(tiny.batches())).loss.backward()
    right = torch.linalg.svd(weight.grad)[2][:4]
    a, _ = pair(tiny.layers_of(model)["model.layers.1.self_attn.o_proj"])
    torch.testing.assert_close((a * right).sum(dim=1).abs(), torch.ones(4), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_data_driven_initialisations_need_data(tiny: Any, name: str) -> None:
    for batches in (None, list):
        with pytest.raises(AdapterError, match=f"{name} reads training rows"):
            attach_adapter(tiny.base(), LoraConfig(init_lora_weights=name), batches=batches)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cls", [LoraConfig, DoraConfig])
def test_loftq_makes_up_for_quantisation(tiny: Any, cls: Any, bits: int) -> None:
    model = tiny.attach(cls(r=16, target_modules="all-linear", init_lora_weights="loftq"), tiny.base(bits=bits))
    plain = tiny.base()
    for name, layer in tiny.layers_of(model).items():
        a, b = pair(layer)
        original = plain.get_submodule(name).weight
        quantised = dequantize_module_weight(layer.get_base_layer()).float()
        error = (original - quantised).norm()
        assert (original - quantised - layer.scaling["default"] * b @ a).norm() < 0.8 * error
        magnitude = layer.lora_magnitude_vector
        if cls is DoraConfig:
            weight = quantised + layer.scaling["default"] * b @ a
            torch.testing.assert_close(magnitude["default"].weight.detach(), weight.norm(dim=1))
    exact, before = tiny.logits(plain), tiny.logits(tiny.base(bits=bits))
    assert (tiny.logits(model) - exact).norm() < 0.9 * (before - exact).norm()


def test_loftq_reads_shards_and_refuses_a_base_without_safetensors(tiny: Any, tmp_path: Any) -> None:
    tiny.base().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    config = LoraConfig(r=4, init_lora_weights="loftq")
    base, other = tiny.base(bits=4), tiny.base(bits=4)
    base.name_or_path = str(tmp_path / "sharded")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    sharded, single = tiny.attach(config, base).state_dict(), tiny.attach(config, other).state_dict()
    adapter = [key for key in sharded if "lora_" in key]
    assert adapter
    assert all(torch.equal(sharded[key], single[key]) for key in adapter)
    empty = tiny.base(bits=4)
    (tmp_path / "empty").mkdir()
    empty.name_or_path = str(tmp_path / "empty")
    with pytest.raises(AdapterError, match="loftq compares the quantised base"):
        tiny.attach(config, empty)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.quantized])
def test_what_reads_full_weights_is_refused_on_a_quantised_base(tiny: Any, name: str, bits: int) -> None:
    with pytest.raises(AdapterError, match=f"init_lora_weights: {name}.*quantised.*Use default"):
        tiny.attach(LoraConfig(init_lora_weights=name), tiny.base(bits=bits))


def test_loftq_is_refused_on_a_full_base(tiny: Any) -> None:
    with pytest.raises(
        AdapterError, match=r"loftq makes up for the error of a quantised base.*quantization: {bits: 4}"
    ):
        tiny.attach(LoraConfig(init_lora_weights="loftq"))


@pytest.mark.parametrize("name", CHANGING)
def test_what_was_taken_out_of_the_base_is_remembered(tiny: Any, name: str) -> None:
    model = tiny.attach(LoraConfig(**ALL_LINEAR, init_lora_weights=name))
    initial = initial_adapter(model.get_base_model())
    assert initial is not None
    assert initial.method == name
    for module, (a, b) in initial.factors.items():
        layer = model.get_submodule(module)
        assert torch.equal(a, pair(layer)[0])
        assert torch.equal(b, pair(layer)[1])
        plain = tiny.base().get_submodule(module.removeprefix("base_model.model.")).weight
        assert torch.equal(layer.get_base_layer().weight, plain - (layer.scaling["default"] * b) @ a)


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora_ga", "mica", "eva", "orthogonal"])
def test_initialisations_for_linear_layers_refuse_embeddings(tiny: Any, name: str) -> None:
    with pytest.raises(AdapterError, match=r"is for linear layers, and 'model.embed_tokens' is a Embedding"):
        tiny.attach(LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=name))


def test_shared_weights_are_not_changed(tiny: Any) -> None:
    base = tiny.base(tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="'lm_head' are shared with another module"):
        tiny.attach(LoraConfig(target_modules=["lm_head"], init_lora_weights="pissa"), base)


@pytest.mark.parametrize(("name", "rank"), [("pissa", 33), ("olora", 33), ("corda", 33), ("mica", 33), ("lora_ga", 17)])
def test_a_rank_that_the_weights_do_not_have(tiny: Any, name: str, rank: int) -> None:
    with pytest.raises(AdapterError, match=r"needs 3[34] singular values, and '.*v_proj' has 32; lower r"):
        tiny.attach(LoraConfig(r=rank, init_lora_weights=name))
    tiny.attach(LoraConfig(r=rank, init_lora_weights=name, rank_pattern={"v_proj": 8}))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**shape)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["default", "pissa", "corda", "lora_ga", "eva"])
def test_conv1d_layers_of_gpt2(tiny: Any, name: str) -> None:
    model = tiny.attach(LoraConfig(r=4, dropout=0.0, init_lora_weights=name), gpt2())
    torch.testing.assert_close(tiny.logits(model), tiny.logits(gpt2()), rtol=0, atol=2e-5)
    assert tiny.gradients(model)


def test_olora_is_refused_on_conv1d_layers(tiny: Any) -> None:
    with pytest.raises(AdapterError, match="olora does not work with the Conv1D layers"):
        tiny.attach(LoraConfig(r=4, init_lora_weights="olora"), gpt2())
