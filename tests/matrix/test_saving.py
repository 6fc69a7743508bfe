"""Every type on every base: saved and loaded, merged where it can be, and interrupted and resumed."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ludwig_peft_plugin.adapters.io import load_adapter
from ludwig_peft_plugin.config.adapter_types import merge_problem
from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export.merge import merged_copy
from ludwig_peft_plugin.model.dequantize import dequantize_model
from ludwig_peft_plugin.model.storage import save_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)  # torch's, of FRoD


@pytest.fixture(scope="module")
def saved(case: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the adapter of the case's model."""
    folder = str(tmp_path_factory.mktemp(case.kind))
    save_weights(as_llm(case.model), folder)
    return folder


def as_llm(model: Any) -> Any:
    """Return what the storage of models reads of a Ludwig model."""
    return SimpleNamespace(model=model, config_obj=SimpleNamespace(adapters=None))


def test_loads_as_it_was_saved(case: Any, saved: str) -> None:
    expected = case.logits(case.model)
    if case.trains_base:
        assert torch.equal(case.logits(type(case.model).from_pretrained(saved)), expected)
        return
    torch.manual_seed(11)  # where it is loaded, nothing is known of the seed it was made with
    loaded = load_adapter(case.base(), saved, trainable=False)
    assert torch.equal(case.logits(loaded), expected)
    assert not case.trained(loaded)
    trainable = case.attach(seed=11, pretrained_adapter_weights=saved)
    assert torch.equal(case.logits(trainable), expected)
    assert case.trained(trainable).keys() == case.trained(case.model).keys()
    if case.precision.section is None:
        torch.manual_seed(12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's remarks were logged when the adapter was made
            plain = PeftModel.from_pretrained(case.base(), saved)
        case.assert_close(case.logits(plain), expected, "in plain PEFT", case.expected.plain_peft)


def test_the_file_holds_the_adapter_alone(case: Any, saved: str) -> None:
    if case.trains_base:
        assert load_file(f"{saved}/model.safetensors").keys() >= case.trained(case.model).keys()
        return
    stored = load_file(f"{saved}/adapter_model.safetensors")
    of_base = case.tensors_of_base
    numbers = {id(tensor) for tensor in of_base}
    # A tensor that modules share is in the file once for each: PEFT's format has no other place for it.
    named = (*case.model.named_parameters(remove_duplicate=False), *case.model.named_buffers(remove_duplicate=False))
    added = [tensor for _, tensor in named if id(tensor) not in numbers]
    made = case.made_tokens(case.model)  # virtual tokens, which PEFT stores beside or in place of what makes them
    assert sum(t.numel() for t in stored.values()) <= case.expected.stored * sum(t.numel() for t in added) + made
    for name, tensor in stored.items():
        twins = [other for other in of_base if other.shape == tensor.shape]
        assert not any(torch.equal(other, tensor) for other in twins), f"{name} is of the base"


def test_merged_it_is_the_same_model(case: Any, saved: str) -> None:
    adapter, base = case.section(), case.base()
    if not case.cls.mergeable:
        assert f"`{case.kind}` cannot be merged" in str(merge_problem(case.cls, case.kind))
        assert case.kind in str(adapter.merge_obstacle(base))
        with pytest.raises(ExportError, match=r"merged"):
            merged_copy(case.model, torch.float32)
        return
    assert merge_problem(case.cls, case.kind) is None
    if case.base_name in case.expected.unmergeable:
        assert case.expected.unmergeable[case.base_name] in str(adapter.merge_obstacle(base))
        with pytest.raises(ExportError):
            merged_copy(case.model, torch.float32)
        return
    assert adapter.merge_obstacle(base) is None
    before = case.logits(case.model)
    merged = merged_copy(case.model, torch.float32)
    assert not getattr(merged, "is_quantized", False)
    assert torch.equal(case.logits(case.model), before)
    case.assert_close(case.logits(merged), before, "", 2 * case.tolerance)
    if case.trains_base:
        return
    plain = load_adapter(dequantize_model(case.base()), saved, trainable=False)
    case.assert_close(case.logits(merged), case.logits(plain), "on the dequantised base", 4e-5)


def test_resumed_it_goes_on_as_if_never_interrupted(case: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "latest.ckpt")
    whole = case.run(case.attach())
    whole.train(range(2))
    halfway = case.logits(whole.model)
    whole.save(path)
    whole.train(range(2, 3))
    resumed = case.run(case.attach())
    resumed.continue_from(whole, path)
    assert torch.equal(case.logits(resumed.model), halfway)
    resumed.train(range(2, 3))
    expected = case.trained(whole.model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in case.trained(resumed.model).items())
    assert torch.equal(case.logits(resumed.model), case.logits(whole.model))
    assert not torch.equal(case.logits(resumed.model), halfway)
