"""Fused layers give the loss and the gradients of transformers' layers with PEFT's adapters in them."""

import copy

import pytest
import torch
from fused_models import ADAPTERS, FAMILIES, adapted, assert_equal, batch, build, four_bit, loss_and_gradients

from ludwig_peft_plugin.engine.fused.layer import obstacle
from ludwig_peft_plugin.engine.install import SWITCH, decoder_layers
from ludwig_peft_plugin.model.float8 import Float8Linear
from ludwig_peft_plugin.training.loss import target_loss


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, monkeypatch):
    assert_equal(adapted(build(family)), monkeypatch)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter, monkeypatch):
    assert_equal(adapted(build("llama with biases"), **ADAPTERS[adapter]), monkeypatch)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_gradient_checkpointing(adapter, monkeypatch):
    model = adapted(build(), **ADAPTERS[adapter])
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_equal(model, monkeypatch)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bit_base(adapter, double, monkeypatch, tmp_path):
    base = four_bit(tmp_path, double=double)
    assert_equal(adapted(base, **ADAPTERS[adapter]), monkeypatch)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_float8_base(adapter, monkeypatch):
    base = build("llama with biases").requires_grad_(False)
    for name, layer in list(base.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            base.set_submodule(name, Float8Linear.from_linear(layer))
    assert_equal(adapted(base, **ADAPTERS[adapter]), monkeypatch)


def test_dropout_is_the_same_in_both_passes_and_has_the_right_mean(monkeypatch):
    """The loss along the gradient's direction changes as the gradient says, with the masks held by the seed."""
    model = adapted(build(), lora_dropout=0.3).train().double()
    for parameter in model.parameters():
        parameter.data = parameter.data.double()

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return target_loss(model, batch()).loss_sum

    value = loss()
    value.backward()
    assert float(loss().detach()) == pytest.approx(float(value.detach()), rel=1e-9)
    trained = [p for p in model.parameters() if p.requires_grad]
    directions = [p.grad / p.grad.norm() for p in trained]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True))
    step, moved = 3e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter.add_(sign * step * direction)
            moved.append(float(loss().detach()))
            for parameter, direction in zip(trained, directions, strict=True):
                parameter.sub_(sign * step * direction)
    assert (moved[0] - moved[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)
    torch.manual_seed(6)
    assert float(target_loss(model, batch()).loss_sum.detach()) != pytest.approx(float(value.detach()), rel=1e-6)


def test_layers_follow_the_state_of_the_adapter():
    model = adapted(build())
    with torch.no_grad():
        trained = float(target_loss(model, batch()).loss_sum)
        with model.disable_adapter():
            base = float(target_loss(model, batch()).loss_sum)
        assert float(target_loss(model, batch()).loss_sum) == trained
        model.merge_adapter()
        assert float(target_loss(model, batch()).loss_sum) == pytest.approx(trained, rel=1e-5)
        model.unmerge_adapter()
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.zero_()
        assert float(target_loss(model, batch()).loss_sum) == pytest.approx(trained, rel=1e-5)
        merged = model.merge_and_unload()
        assert float(target_loss(merged, batch()).loss_sum) == pytest.approx(trained, rel=1e-5)
    assert base != pytest.approx(trained, rel=1e-3)


def test_generation_is_transformers_own_after_training_forwards():
    model = adapted(build()).eval()
    ids = torch.randint(0, 61, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = model.generate(input_ids=ids, attention_mask=mask, **settings)
    target_loss(model, batch())
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), before)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": "all"}, "trained itself"),
        ({"modules_to_save": ["input_layernorm"]}, "more than LoRA"),
        ({"use_dora": True, "lora_dropout": 0.1}, "DoRA with dropout"),
        ({"lora_bias": True}, "biases"),
    ],
)
def test_what_cannot_be_fused_runs_plainly_and_right(options, reason, monkeypatch):
    model = adapted(build("llama with biases"), **options).eval()
    assert reason in str(obstacle(decoder_layers(model)[0], torch.float32))
    loss, gradients = loss_and_gradients(model)
    monkeypatch.setenv(SWITCH, "0")
    plain = copy.deepcopy(model)
    for layer in decoder_layers(plain):
        layer.__dict__.pop("forward", None)
    assert loss_and_gradients(plain)[0] == pytest.approx(loss, rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_second_backward_pass_is_refused():
    loss = target_loss(adapted(build()), batch()).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot run twice"):
        loss.backward()
