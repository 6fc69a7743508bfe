"""What AdaLoRA and AdaMSS do in each step: ranks and subspaces taken away on schedule, exactly resumable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry

from ludwig_peft_plugin.adapters.io import load_adapter, save_adapter
from ludwig_peft_plugin.errors import AdapterError

STEPS = 12
MODULES = ["q_proj", "v_proj", "down_proj"]


def adapter(name: str, **given: Any) -> Any:
    return adapter_registry[name](target_modules=MODULES, **given)


def train(tiny: Any, model: Any, hooks: Any, optimizer: Any, first: int, last: int) -> None:
    """Take steps `first` to `last`, as the trainer does."""
    model.train()
    for step in range(first, last + 1):
        loss = model(**list(tiny.batches())[step % 2]).loss
        if (term := hooks.loss_term()) is not None:
            loss = loss + term
        loss.backward()
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()


def started(tiny: Any, section: Any, steps: int = STEPS, **base: Any) -> tuple[Any, Any, Any]:
    model = tiny.attach(section, tiny.base(**base))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, section.step_hooks(model, steps), torch.optim.AdamW(trained, lr=1e-2)


def ranks(model: Any) -> list[int]:
    return [int((p != 0).sum()) for n, p in model.named_parameters() if ".lora_E." in n]


def test_ranks_fall_to_the_target_and_stay(tiny: Any) -> None:
    section = adapter("adalora", init_r=6, target_r=2, dropout=0.0)
    model, hooks, optimizer = started(tiny, section)
    layers = 3 * tiny.layers
    train(tiny, model, hooks, optimizer, 1, 1)
    assert sum(ranks(model)) == 6 * layers  # tinit is a tenth of the run
    seen = []
    for step in range(2, STEPS + 1):
        train(tiny, model, hooks, optimizer, step, step)
        seen.append(sum(ranks(model)))
    assert seen == sorted(seen, reverse=True)
    assert seen[STEPS - STEPS // 3 - 2] == seen[-1] == 2 * layers
    assert len(set(ranks(model))) > 1  # layers keep what they need, not two each


def test_loss_term_is_the_mean_distance_from_orthogonality(tiny: Any) -> None:
    model, hooks, _ = started(tiny, adapter("adalora", orth_reg_weight=0.3))
    distances = []
    for name, factor in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = factor @ factor.T if ".lora_A." in name else factor.T @ factor
            distances.append((gram - torch.eye(len(gram))).square().sum().sqrt())
    assert torch.allclose(hooks.loss_term(), 0.3 * torch.stack(distances).mean())
    hooks.loss_term().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_A." in n)
    assert started(tiny, adapter("adalora", orth_reg_weight=0.0))[1].loss_term() is None


@pytest.mark.parametrize(
    ("name", "options", "stop"),
    [
        ("adalora", {"init_r": 6, "target_r": 2, "dropout": 0.0}, 5),
        ("adalora", {"init_r": 6, "target_r": 2, "dropout": 0.0}, 10),
        (
            "adamss",
            {"r": 16, "use_asa": True, "asa_target_subspaces": 9, "init_warmup": 2, "final_warmup": 10}
            | {"mask_interval": 2},
            7,
        ),
    ],
)
def test_resumed_steps_are_those_of_an_uninterrupted_run(
    tiny: Any, name: str, options: dict[str, Any], stop: int
) -> None:
    whole, hooks, optimizer = started(tiny, adapter(name, **options))
    train(tiny, whole, hooks, optimizer, 1, STEPS)

    model, hooks, optimizer = started(tiny, adapter(name, **options))
    train(tiny, model, hooks, optimizer, 1, stop)
    tensors, values = hooks.state()
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    moments = optimizer.state_dict()

    resumed, hooks, optimizer = started(tiny, adapter(name, **options))
    with torch.no_grad():
        for key, parameter in resumed.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[key])
    optimizer.load_state_dict(moments)
    hooks.restore(kept, values)
    train(tiny, resumed, hooks, optimizer, stop + 1, STEPS)
    expected = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert len(expected) > 20
    for key, parameter in resumed.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, expected[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_after_ranks_were_taken_is_exact(tiny: Any, tmp_path: Any, dtype: torch.dtype) -> None:
    model, hooks, optimizer = started(tiny, adapter("adalora", init_r=6, target_r=2), dtype=dtype)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "ranknum" in n)
    train(tiny, model, hooks, optimizer, 1, STEPS)
    save_adapter(model, str(tmp_path))
    loaded = load_adapter(tiny.base(dtype=dtype), str(tmp_path), trainable=True)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert ranks(loaded) == ranks(model)


def test_subspaces_freeze_until_the_target_is_left(tiny: Any) -> None:
    options = {"r": 16, "use_asa": True, "asa_target_subspaces": 9, "init_warmup": 2, "final_warmup": 10}
    model, hooks, optimizer = started(tiny, adapter("adamss", mask_interval=2, **options))
    total = sum(".adamss_A." in n for n, p in model.named_parameters() if p.requires_grad)
    train(tiny, model, hooks, optimizer, 1, 10)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".adamss_A." in n}
    train(tiny, model, hooks, optimizer, 11, STEPS)
    moved = sum(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert 0 < moved <= 9 < total  # PEFT keeps those above the ninth score
    assert adapter("adamss", r=16).step_hooks(model, STEPS) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adalora", {"tinit": 8, "tfinal": 4}, "tinit: 8 and tfinal: 4 leave no step of 12"),
        ("adalora", {"total_step": 500}, "total_step: 500, but the run has 12 steps"),
        ("adamss", {"use_asa": True}, "final_warmup: 1000 is past the 12 steps"),
    ],
)
def test_schedules_that_do_not_fit_the_run(tiny: Any, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        started(tiny, adapter(name, **options))
