"""Chosen weights of the base, trained as copies: what starts, trains, is saved, merged and switched off."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import disturbed
from ludwig.schema.llms.peft import adapter_registry
from peft import LNTuningModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from safetensors.torch import load_file

from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.adapters.selective.model import NormTuningModel
from ludwig_peft_plugin.errors import AdapterError
from ludwig_peft_plugin.export.merge import merged_copy

BIASES = {"attention_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "biases": ("bitfit", {}, BIASES),
    "new biases": ("bitfit", {"create": True}, {}),
    "norms": ("ln_tuning", {}, {}),
    "last layers": ("layers", {}, {}),
    "a range and the head": ("layers", {"range": [0, 1], "include_head": True}, {}),
    "a tied head": ("layers", {"first": 1, "include_head": True}, {"tie_word_embeddings": True}),
    "by pattern": ("layers", {"pattern": r".*\.(up_proj|embed_tokens)\.weight"}, {}),
}
"""Type, its options, and what its base has."""
QUANTISED = ("biases", "new biases", "norms")


def section(case: str, **options: Any) -> Any:
    kind, given, _ = CASES[case]
    return adapter_registry[kind](**{**given, **options})


def base(tiny: Any, case: str, **options: Any) -> Any:
    """Return the case's base, whose biases and norms are not zeros and ones, where mistakes would not show."""
    return with_random_vectors(tiny.base(**CASES[case][2], **options))


def with_random_vectors(model: Any, scale: float = 0.2) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_starts_as_the_base_trains_float32_copies_and_leaves_it_alone(tiny: Any, case: str, dtype: Any) -> None:
    plain = base(tiny, case, dtype=dtype)
    logits = tiny.logits(plain)
    model = tiny.attach(section(case), plain)
    assert torch.equal(tiny.logits(model), logits)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert tiny.gradients(model).keys() == trained.keys()
    before = tiny.weights(model)
    tiny.train(model)
    after = tiny.weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tiny.logits(model) - logits).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), logits)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_weights_themselves(tiny: Any, case: str) -> None:
    plain = base(tiny, case)
    reference = copy.deepcopy(plain)
    model = tiny.attach(section(case), plain)
    gradients = {name.removeprefix("base_model.model."): value for name, value in tiny.gradients(model).items()}
    reference.requires_grad_(True)
    if case == "new biases":
        for module in reference.modules():
            if isinstance(module, torch.nn.Linear) and module is not reference.lm_head:
                module.bias = torch.nn.Parameter(torch.zeros(module.out_features))
    expected = tiny.gradients(reference)
    assert gradients
    for name, gradient in gradients.items():
        module, _, rest = name.rpartition(".default.")
        torch.testing.assert_close(gradient, expected[f"{module.rpartition('.')[0]}.{rest}"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("bits", "case"), [(bits, case) for bits in (4, 8) for case in QUANTISED])
def test_on_a_quantised_base(tiny: Any, case: str, bits: int, tmp_path: Path) -> None:
    """The gradient of a bias is that of a dequantised model's: bitsandbytes' own is of the wrong shape."""
    plain = base(tiny, case, bits=bits)
    logits = tiny.logits(plain)
    model = tiny.attach(section(case), plain)
    assert torch.equal(tiny.logits(model), logits)
    gradients = tiny.gradients(model)
    other = merged_copy(model, torch.float32)
    again = tiny.gradients(tiny.attach(section(case), other))
    assert gradients.keys() == again.keys()
    tolerance = 1e-4 if bits == 4 else 0.1  # LLM.int8() rounds activations too
    for name, gradient in gradients.items():
        assert (gradient - again[name]).norm() <= tolerance * again[name].norm(), name
    disturbed(model, 0.1, seed=3)
    trained = tiny.logits(model)
    save_adapter(model, str(tmp_path))
    loaded = load_adapter(base(tiny, case, bits=bits), str(tmp_path), trainable=False)
    assert torch.equal(tiny.logits(loaded), trained)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), logits)


def test_quantised_weights_are_refused_and_others_trained(tiny: Any) -> None:
    layers = adapter_registry["layers"]
    with pytest.raises(AdapterError, match=r"layers cannot train 'model\.layers\.1\.self_attn\.q_proj\.weight'.*qlora"):
        tiny.attach(layers(), tiny.base(bits=4))
    model = tiny.attach(layers(pattern=r"lm_head\.weight|.*norm\.weight"), tiny.base(bits=4))
    assert len(tiny.gradients(model)) == 2 * tiny.layers + 2


@pytest.mark.parametrize("case", CASES)
def test_saved_is_what_was_chosen_and_loads_to_the_same_model(tiny: Any, case: str, tmp_path: Path) -> None:
    model = disturbed(tiny.attach(section(case), base(tiny, case)), 0.1, seed=3)
    save_adapter(model, str(tmp_path))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shared = model.get_base_model().lm_head.weight.numel() if case == "a tied head" else 0
    assert sum(tensor.numel() for tensor in stored.values()) == trained + shared
    logits = tiny.logits(model)
    assert torch.equal(tiny.logits(load_adapter(base(tiny, case), str(tmp_path), trainable=False)), logits)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(base(tiny, case), str(tmp_path))), logits)
    resumed = load_adapter(base(tiny, case), str(tmp_path), trainable=True)
    assert tiny.gradients(resumed).keys() == tiny.gradients(model).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_merged_gives_the_same_logits(tiny: Any, case: str, dtype: Any) -> None:
    """Without rounding twice: the copies are rounded in every forward pass as they are when they are merged."""
    plain = base(tiny, case, dtype=dtype)
    model = disturbed(tiny.attach(section(case), plain), 0.1, seed=3)
    trained = tiny.logits(model)
    model.merge_adapter()
    tolerance = 0.03 if case == "new biases" and dtype == torch.bfloat16 else 1e-6  # which adds after rounding
    torch.testing.assert_close(tiny.logits(model), trained, rtol=0, atol=tolerance)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model), trained)
    if case == "new biases":
        assert "no place for" in str(section(case).merge_obstacle(plain))
        return
    assert section(case).merge_obstacle(plain) is None
    merged = merged_copy(model, dtype)
    torch.testing.assert_close(tiny.logits(merged), trained, rtol=0, atol=1e-6)
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == (case == "a tied head")


@pytest.mark.parametrize("case", CASES)
def test_several_adapters_on_one_base(tiny: Any, case: str) -> None:
    model = disturbed(tiny.attach(section(case), base(tiny, case)), 0.1, seed=3)
    first = tiny.logits(model)
    model.add_adapter("other", section(case).to_config(task_type="CAUSAL_LM"))
    model.set_adapter("other")
    with model.disable_adapter():
        plain = tiny.logits(model)
    assert torch.equal(tiny.logits(model), plain)
    disturbed(model, 0.1, seed=4)
    second = tiny.logits(model)
    model.set_adapter("default")
    assert torch.equal(tiny.logits(model), first)
    assert not torch.equal(first, second)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="train the same weights; only one of them can be active"):
        tiny.logits(model)
    with pytest.raises(ValueError, match="train the same weights; merge one of them"):
        model.merge_adapter(["default", "other"])
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(tiny.logits(model), second)


def test_small_updates_of_a_16_bit_base_add_up(tiny: Any) -> None:
    """A step of 1e-3 beside a bfloat16 one is rounded away; 20 of them are not lost."""
    model = tiny.attach(adapter_registry["ln_tuning"](), tiny.base(dtype=torch.bfloat16))
    before = tiny.logits(model)
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-3)
    weight = model.get_base_model().model.norm.copies["default"]["weight"]
    torch.testing.assert_close(weight, torch.full_like(weight, 1.02))
    assert not torch.equal(tiny.logits(model), before)


def test_a_tied_weight_is_trained_once_and_in_both_places(tiny: Any) -> None:
    model = tiny.attach(section("a tied head"), base(tiny, "a tied head"))
    inner = model.get_base_model()
    embedding, head = inner.model.embed_tokens, inner.lm_head
    assert embedding.copies["default"]["weight"] is head.copies["default"]["weight"]
    assert tiny.attach(section("last layers"), tiny.base(tie_word_embeddings=True)).get_base_model().lm_head is not head
    tiny.train(model)
    assert torch.equal(embedding.copies["default"]["weight"], head.copies["default"]["weight"])


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT of each LlamaRMSNorm
def test_folders_of_ln_tuning_are_those_of_peft(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = disturbed(tiny.attach(section("norms"), base(tiny, "norms")), 0.1, seed=3)
    logits = tiny.logits(model)
    save_adapter(model, str(tmp_path / "ours"))
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LN_TUNING] is NormTuningModel
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LN_TUNING, LNTuningModel)  # as without the plugin
    plain = PeftModel.from_pretrained(base(tiny, "norms"), str(tmp_path / "ours"))
    assert isinstance(plain.base_model, LNTuningModel)
    assert torch.equal(tiny.logits(plain), logits)
    plain.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    monkeypatch.undo()
    loaded = load_adapter(base(tiny, "norms"), str(tmp_path / "theirs"), trainable=False)
    assert isinstance(loaded.base_model, NormTuningModel)
    assert torch.equal(tiny.logits(loaded), logits)


def test_a_saved_choice_does_not_depend_on_the_rule(tiny: Any, tmp_path: Path) -> None:
    save_adapter(tiny.attach(section("last layers")), str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert stored["peft_type"] == "LAYERS"
    assert len(stored["parameter_names"]) == 2 * 9
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in stored["parameter_names"])
    stored["last"] = 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored), encoding="utf-8")
    assert len(tiny.gradients(load_adapter(tiny.base(), str(tmp_path), trainable=True))) == 2 * 9


def test_training_goes_on_from_a_trained_adapter_of_the_same_type(tiny: Any, tmp_path: Path) -> None:
    model = disturbed(tiny.attach(section("norms"), base(tiny, "norms")), 0.1, seed=3)
    save_adapter(model, str(tmp_path))
    again = tiny.attach(section("norms", pretrained_adapter_weights=str(tmp_path)), base(tiny, "norms"))
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    with pytest.raises(AdapterError, match="is a LN_TUNING adapter, not one of type layers"):
        tiny.attach(section("last layers", pretrained_adapter_weights=str(tmp_path)))
