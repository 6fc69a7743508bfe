"""Full fine-tuning as an adapter type: one door with the others, and the same run as without an adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ludwig.error import ConfigValidationError
from ludwig.schema.llms.peft import adapter_registry
from micro_batches import micro_batch
from text_runs import new_trainer, take_steps, text_config

from ludwig_peft_plugin.data.batches import StepBatch
from ludwig_peft_plugin.errors import AdapterError, ExportError

STEPS = 4


def full(**options: Any) -> Any:
    return adapter_registry["full"](**options)


def config(adapter: Any, **sections: Any) -> Any:
    trainer = {"learning_rate": 1e-3, **sections.pop("trainer", {})}
    return text_config(adapter=adapter, trainer=trainer, **sections)


def batches() -> list[StepBatch]:
    """Steps of two rows each."""
    return [StepBatch.of([micro_batch((10, 14), seed=seed)]) for seed in range(STEPS)]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.model.named_parameters()}


@pytest.fixture(scope="module")
def trained(registered: None) -> tuple[Any, list[float]]:
    """A trainer after all steps, and their losses."""
    trainer = new_trainer(config({"type": "full"}))
    return trainer, take_steps(trainer, batches())


def test_the_base_itself_is_trained_in_float32(tiny: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny.base(dtype=dtype)
        model = tiny.attach(full(), base)
        assert model is base
        assert {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()} == {
            (torch.float32, True)
        }
    assert tiny.gradients(model).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_refused_with_the_reason(tiny: Any, bits: int) -> None:
    with pytest.raises(AdapterError, match="full does not work on a quantised base, because its weights are rounded"):
        tiny.attach(full(), tiny.base(bits=bits))


def test_what_is_for_adapters_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"cannot stand beside other adapters, be disabled.*type layers"):
        full().to_config(task_type="CAUSAL_LM")
    assert "cannot share a base" in str(full().sharing_obstacle())


def test_it_is_the_run_without_an_adapter(trained: tuple[Any, list[float]]) -> None:
    trainer, losses = trained
    other = new_trainer(config(None))
    assert take_steps(other, batches()) == losses
    mine, theirs = weights(trainer), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    trainable, total = trainer.model.parameter_counts()
    assert trainable == total == sum(weight.numel() for weight in mine.values())


def test_every_weight_changes(trained: tuple[Any, list[float]]) -> None:
    after, before = weights(trained[0]), weights(new_trainer(config({"type": "full"})))
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_products_in_bfloat16_and_weights_in_float32(trained: tuple[Any, list[float]]) -> None:
    trainer = new_trainer(config({"type": "full", "compute": "bfloat16"}))
    assert trainer.autocast == torch.bfloat16
    seen: set[torch.dtype] = set()
    hook = trainer.model.model.model.layers[0].mlp.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    losses = take_steps(trainer, batches())
    hook.remove()
    assert seen == {torch.bfloat16}
    assert {weight.dtype for weight in weights(trainer).values()} == {torch.float32}
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    assert {state.dtype for state in states} == {torch.float32}
    assert losses != trained[1]
    assert losses == pytest.approx(trained[1], rel=0.02)
    assert new_trainer(config({"type": "full", "compute": "float32"})).autocast is None


def test_on_a_gpu_auto_is_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert full().computes_in_bfloat16(gpu, "auto")
    assert not full().computes_in_bfloat16(gpu, "float32")
    assert not full().computes_in_bfloat16(cpu, "auto")
    assert not full(compute="float32").computes_in_bfloat16(gpu, "auto")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert not full().computes_in_bfloat16(gpu, "auto")


def test_resume_is_the_uninterrupted_run(trained: tuple[Any, list[float]], tmp_path: Path) -> None:
    from ludwig.distributed.base import LocalStrategy

    from ludwig_peft_plugin.training.checkpoint import TrainingCheckpoint

    first = new_trainer(config({"type": "full"}))
    take_steps(first, batches()[:2])
    path = str(tmp_path / "latest.ckpt")
    TrainingCheckpoint(LocalStrategy(), first.model, first.optimizer).save(path, 2)
    again = new_trainer(config({"type": "full"}))
    TrainingCheckpoint(LocalStrategy(), again.model, again.optimizer).load(path)
    assert take_steps(again, batches()[2:]) == trained[1][2:]
    expected = weights(trained[0])
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(again).items())


def test_the_saved_model_is_the_whole_model(trained: tuple[Any, list[float]], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from ludwig_peft_plugin.model.llm import PeftLLM

    llm = trained[0].model
    llm.save(str(tmp_path))
    folder = tmp_path / "model_weights"
    assert not (folder / "adapter_config.json").exists()
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == llm.parameter_counts()[0]
    loaded = PeftLLM(config({"type": "full"}), _device="cpu")
    loaded.load(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    ids = batches()[0].micro_batches[0].input_ids[None]
    with torch.no_grad():
        logits = llm.model.eval()(input_ids=ids).logits
        assert torch.equal(loaded.model.eval()(input_ids=ids).logits, logits)
        assert torch.equal(plain(input_ids=ids).logits, logits)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    llm.model.train()


def test_exported_merged_it_is_the_model_itself(trained: tuple[Any, list[float]]) -> None:
    from ludwig_peft_plugin.export.adapter import AdapterFormat
    from ludwig_peft_plugin.export.merged import merged_model

    llm = trained[0].model
    merged = dict(merged_model(llm).named_parameters())
    assert all(torch.equal(merged[name], weight) for name, weight in weights(trained[0]).items())
    with pytest.raises(ExportError, match="full fine-tuning has no adapter; use format: merged"):
        AdapterFormat().check(llm.config_obj)


@pytest.mark.parametrize(
    ("adapter", "sections", "message"),
    [
        ({}, {"quantization": {"bits": 4}}, r"`full` cannot be trained on a quantised base, because its weights"),
        ({}, {"precision": "bfloat16"}, r"precision: `bfloat16` weights are too coarse.*adapter\.compute"),
        ({"compute": "bfloat16"}, {"precision": "float32"}, r"precision: `float32` contradicts adapter\.compute"),
        ({}, {"trainer": {"use_mixed_precision": True}}, r"use_mixed_precision: is not read beside adapter `full`"),
        ({}, {"export": [{"format": "adapter"}]}, r"export\[0\]: there is no adapter to write"),
        ({"pretrained_adapter_weights": "there"}, {}, r"pretrained_adapter_weights: full fine-tuning has no adapter"),
    ],
)
def test_settings_that_contradict(
    registered: None, adapter: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigValidationError, match=message):
        config({"type": "full", **adapter}, **copy.deepcopy(sections))


def test_the_estimate_counts_every_weight(registered: None) -> None:
    """16 bytes a parameter: weight, gradient and Adam's two moments; bfloat16 products keep less."""
    from ludwig_peft_plugin.estimate.batch import BatchShape
    from ludwig_peft_plugin.estimate.memory import Estimator

    shape = BatchShape(512, 2, 256, 510)
    made = {
        name: Estimator(config({"type": "full", "compute": name}, trainer={"optimizer": {"type": "adamw"}}))
        for name in ("float32", "bfloat16", "auto")
    }
    for estimator in made.values():
        count = estimator.parameters
        assert count.trained == count.base
        assert count.adapter == estimator.adapter_bytes == 0
        assert estimator.base_bytes == pytest.approx(4 * count.base, rel=1e-3)
        assert estimator.gradient_bytes == pytest.approx(4 * count.base, rel=1e-3)
        assert estimator.optimiser.state == pytest.approx(8 * count.base, rel=0.01)
    saved = {name: estimator.estimate(shape).saved for name, estimator in made.items()}
    assert saved["bfloat16"] < 0.9 * saved["float32"]
    assert saved["auto"] == saved["bfloat16"]
