"""Soft prompts: how virtual tokens start, and bases of every precision."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import disturbed
from ludwig.error import ConfigValidationError
from ludwig.schema.llms.peft import adapter_registry
from pydantic import ValidationError
from soft_prompt_models import COUNT, TASK, VARIANTS, logits, section, train
from torch import Tensor
from transformers import LlamaForCausalLM

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.soft_prompt_start import embeddings_of, keys_and_values_of
from ludwig_peft_plugin.config.adapter_types import adapter_class
from ludwig_peft_plugin.engine.virtual_tokens import virtual_tokens
from ludwig_peft_plugin.errors import AdapterError
from ludwig_peft_plugin.model.dequantize import dequantize_model
from ludwig_peft_plugin.model.row_scaled_loading import LAYERS, RowScaledConfig

# ---- how they start -------------------------------------------------------------------------------------------------


def starts(tiny: Any, variant: str, **options: Any) -> tuple[Any, Any, Tensor]:
    """Return a base, the prompt put on it, and what it holds, (P, d): keys and values, or embeddings."""
    base = tiny.base()
    model = tiny.attach(section(variant, **options), base=base)
    return base, model, model.get_prompt_embedding_to_save("default")


@pytest.mark.parametrize("variant", ["prefix", "projected prefix", "cartridge"])
def test_a_prefix_starts_as_keys_and_values_of_training_rows(tiny: Any, variant: str) -> None:
    base, model, found = starts(tiny, variant)
    rows = next(tiny.batches())
    torch.testing.assert_close(found, keys_and_values_of(base, rows["input_ids"][0, :COUNT]), rtol=1e-4, atol=1e-5)
    # So a model with the prefix goes on as after the tokens themselves.
    own, whole = tiny.ids[1:2], torch.cat([rows["input_ids"][:1, :COUNT], tiny.ids[1:2]], dim=1)
    with torch.no_grad():
        expected = base(input_ids=whole).logits[:, COUNT:]
        torch.testing.assert_close(model(input_ids=own).logits, expected, rtol=1e-3, atol=1e-4)


def test_rows_are_joined_where_one_is_too_short(tiny: Any) -> None:
    _, _, found = starts(tiny, "prompt", init="data", num_virtual_tokens=40)
    batch = next(tiny.batches())
    tokens = torch.cat([batch["input_ids"][0][batch["attention_mask"][0].bool()], batch["input_ids"][1]])[:40]
    assert torch.equal(found, embeddings_of(tiny.base(), tokens))


@pytest.mark.parametrize("variant", ["prompt", "mlp", "lstm", "multitask"])
def test_embeddings_start_as_tokens_of_the_vocabulary(tiny: Any, variant: str) -> None:
    base, model, found = starts(tiny, variant)
    vocabulary = base.get_input_embeddings().weight.float()
    nearest = torch.cdist(found.double(), vocabulary.double()).min(dim=1)
    assert float(nearest.values.max()) < 1e-4
    assert int(nearest.indices[0]) == base.config.bos_token_id, "a text begins there"
    assert len(set(nearest.indices.tolist())) > COUNT // 2
    if variant == "multitask":
        prompts = model.get_prompt(3, torch.arange(3))
        torch.testing.assert_close(prompts[2], found, rtol=0, atol=1e-6)


def test_a_text_is_read_with_the_bases_tokenizer(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tokenizer(name: str, trust_remote_code: bool) -> Any:
        asked.append(name)
        return lambda text: {"input_ids": [ord(letter) - ord("a") for letter in text]}

    monkeypatch.setattr("ludwig_peft_plugin.model.base_model.load_tokenizer", tokenizer)
    base, _, found = starts(tiny, "prompt", init="text", init_text="abcd")
    assert torch.equal(found, embeddings_of(base, torch.tensor([0, 1, 2, 3, 0, 1]))), "it is repeated"
    _, _, prefix = starts(tiny, "prefix", init="text", init_text="abcdefghi")
    assert torch.allclose(prefix, keys_and_values_of(base, torch.arange(6)), atol=1e-6), "it is cut"
    assert asked == [base.name_or_path] * 2


@pytest.mark.parametrize("variant", ["prefix", "projected prefix"])
def test_zeros(tiny: Any, variant: str) -> None:
    assert starts(tiny, variant, init="zero")[2].abs().max() == 0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "adaption"])
def test_a_random_start_is_another_one(tiny: Any, variant: str) -> None:
    default, chance = starts(tiny, variant)[2], starts(tiny, variant, init="random")[2]
    assert (default - chance).norm() > 0.1 * chance.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_gives_the_same_start(tiny: Any, variant: str) -> None:
    first, second = (tiny.attach(section(variant)) for _ in range(2))
    names = [name for name, parameter in first.named_parameters() if parameter.requires_grad]
    assert names
    for name in names:
        assert first.get_parameter(name).dtype == torch.float32
        assert torch.equal(first.get_parameter(name), second.get_parameter(name))


def test_an_adaption_prompt_starts_as_the_base(tiny: Any) -> None:
    base = tiny.base()
    expected = base(input_ids=tiny.ids, attention_mask=tiny.mask).logits.detach()[tiny.mask.bool()]
    model = tiny.attach(section("adaption"), base=base)
    torch.testing.assert_close(logits(tiny, model), expected, rtol=0, atol=1e-6)
    assert (logits(tiny, disturbed(model, 0.3)) - expected).abs().max() > 1e-3


def test_sources_of_multitask_prompts(tiny: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "source")
    source = disturbed(tiny.attach(section("multitask")), 0.3).eval()
    save_adapter(source, folder)
    theirs = source.prompt_encoder["default"]
    take = {"source": folder, "num_tasks": 2}
    average = tiny.attach(section("multitask", init="average_source_tasks", **take)).prompt_encoder["default"]
    exact = tiny.attach(section("multitask", init="exact_source_task", source_task=2, **take)).prompt_encoder["default"]
    shared = tiny.attach(section("multitask", init="only_source_shared", **take)).prompt_encoder["default"]
    for mine in (average, exact, shared):
        assert torch.equal(mine.embedding.weight, theirs.embedding.weight)
    torch.testing.assert_close(average.prefix_task_cols[1], theirs.prefix_task_cols.mean(dim=0))
    assert torch.equal(exact.prefix_task_rows[1], theirs.prefix_task_rows[2])
    assert torch.equal(shared.prefix_task_cols, torch.ones_like(shared.prefix_task_cols))
    with pytest.raises(AdapterError, match=r"source_task: 3, but .* has the tasks 0 to 2"):
        tiny.attach(section("multitask", init="exact_source_task", source_task=3, **take))
    with pytest.raises(AdapterError, match="num_virtual_tokens, num_ranks"):
        tiny.attach(section("multitask", init="only_source_shared", num_virtual_tokens=5, **take))


# ---- bases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_quantised_bases(tiny: Any, variant: str, bits: int, tmp_path: Path) -> None:
    model = tiny.attach(section(variant), base=tiny.base(bits=bits))
    frozen = tiny.weights(model)
    train(tiny, model)
    assert all(torch.equal(frozen[name], p.data) for name, p in model.named_parameters() if not p.requires_grad)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.dtype == torch.float32 for p in trained.values())
    save_adapter(model, str(tmp_path / "adapter"))
    loaded = load_adapter(tiny.base(bits=bits), str(tmp_path / "adapter"), trainable=False)
    torch.testing.assert_close(logits(tiny, loaded), logits(tiny, model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", LAYERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bases_of_torchao(tiny: Any, variant: str, mode: str) -> None:
    """A prompt on a base in 8-bit rows is what it is on the dequantised base."""

    def base() -> Any:
        return LlamaForCausalLM.from_pretrained(tiny.folder(), quantization_config=RowScaledConfig(mode))

    models = [tiny.attach(section(variant), base=made) for made in (base(), dequantize_model(base()))]
    for model in models:
        train(tiny, model)
    names = [name for name, p in models[0].named_parameters() if p.requires_grad]
    assert names == [name for name, p in models[1].named_parameters() if p.requires_grad]
    for name in names:
        assert models[0].get_parameter(name).dtype == torch.float32
        torch.testing.assert_close(models[0].get_parameter(name), models[1].get_parameter(name))
    torch.testing.assert_close(logits(tiny, models[0]), logits(tiny, models[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_float32_over_a_base_in_16_bits(tiny: Any, variant: str) -> None:
    model = tiny.attach(section(variant), base=tiny.base(dtype=torch.bfloat16))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(tiny, model)
    assert all(tensor.dtype == torch.float32 for tensor in before.values())
    assert all(not torch.equal(tensor, model.get_parameter(name)) for name, tensor in before.items())
    assert logits(tiny, model).dtype == torch.bfloat16


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("prompt_tuning", {"init": "text"}, "init_text is missing"),
        ("prompt_tuning", {"init_text": "abc"}, "init_text has no effect"),
        ("prompt_tuning", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ("prefix_tuning", {"encoder_hidden_size": 8}, "encoder_hidden_size has no effect"),
        ("p_tuning", {"encoder_num_layers": 3}, "encoder_num_layers has no effect"),
        ("p_tuning", {"encoder_dropout": 0.1}, "encoder_dropout has no effect"),
        ("p_tuning", {"encoder_reparameterization_type": "RNN"}, "encoder_reparameterization_type"),
        ("cartridge", {"num_frozen_tokens": 32}, "num_frozen_tokens: 32 leaves none"),
        ("multitask_prompt_tuning", {}, "task_column is missing"),
        ("multitask_prompt_tuning", {**TASK, "tasks": ["a", "b"]}, "tasks must name 3"),
        ("multitask_prompt_tuning", {**TASK, "init": "exact_source_task"}, "source and init belong together"),
        ("multitask_prompt_tuning", {**TASK, "source": "x"}, "source and init belong together"),
        ("multitask_prompt_tuning", {**TASK, "source_task": 1}, "source_task has no effect"),
    ],
)
def test_options_that_cannot_be(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigValidationError, ValidationError), match=message):
        adapter_registry[kind](**options)


def test_prompts_that_fill_the_context_are_refused(tiny: Any) -> None:
    with pytest.raises(AdapterError, match=r"num_virtual_tokens: 127 leaves no room .* use at most 126"):
        tiny.attach(section("prompt", num_virtual_tokens=127))
    tiny.attach(section("prompt", num_virtual_tokens=126))


def test_more_layers_than_there_are(tiny: Any) -> None:
    with pytest.raises(AdapterError, match="adapter_layers: 4, but the base has 3"):
        tiny.attach(section("adaption", adapter_layers=4))
    model = tiny.attach(section("adaption", adapter_layers=1))
    assert [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("gate")] == [
        "base_model.model.model.layers.2.self_attn.adaption_gate"
    ]


def test_data_must_be_there(tiny: Any) -> None:
    with pytest.raises(AdapterError, match="init: data reads training rows"):
        attach_adapter(tiny.base(), section("prefix"))


def test_what_the_types_say_about_themselves(tiny: Any) -> None:
    assert adapter_class("prefix") is adapter_registry["prefix_tuning"]
    for variant in VARIANTS:
        adapter = section(variant)
        cls = type(adapter)
        assert cls.family == "soft prompt"
        assert cls.soft_prompt
        assert cls.quantized_base
        assert not cls.mergeable
        assert cls.paper
        assert cls.good_for
        assert cls.learning_rate
        assert "virtual tokens" in adapter.merge_obstacle(tiny.base()) or variant == "adaption"
        assert adapter.context_tokens == (0 if variant == "adaption" else COUNT)
        plain = copy.deepcopy(adapter)
        plain.start_plainly()
        assert not plain.needs_data


def test_the_options_are_pefts(tiny: Any) -> None:
    """Each option reaches PEFT, or is the plugin's own."""
    own = {"type", "pretrained_adapter_weights", "postprocessor", "init", "init_text", "task_column", "tasks"}
    for variant in VARIANTS:
        adapter = section(variant)
        fields = set(type(adapter).model_fields) - own
        config = adapter.to_config(task_type="CAUSAL_LM", unknown=1)
        renamed = {option: field for field, option in type(adapter).renamed.items()}
        assert all(hasattr(config, renamed.get(field, field)) for field in fields)
    assert virtual_tokens(tiny.base()) is None
