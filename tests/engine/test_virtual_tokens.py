"""A flat row with virtual tokens gives the loss and gradients of PEFT's own padded forward with an attention mask."""

import copy

import numpy as np
import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
from ludwig_peft_plugin.engine.forward import target_logits, target_states, unwrapped
from ludwig_peft_plugin.engine.install import SWITCH
from ludwig_peft_plugin.engine.transformers_attention import supports_padding_free
from ludwig_peft_plugin.engine.virtual_tokens import needs_tasks, virtual_tokens
from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.training.loss import target_loss

TOKENS, TASKS, VOCABULARY = 5, 3, 53
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BASES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "mistral with a window": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=7)),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
    ),
    "gemma2, on padded rows": (
        Gemma2ForCausalLM,
        Gemma2Config(**SHAPE, head_dim=8, sliding_window=32, query_pre_attn_scalar=8),
    ),
}
COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}
PROMPTS = {
    "prefix": lambda: PrefixTuningConfig(**COMMON),
    "prefix with projection": lambda: PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=24),
    "prompt": lambda: PromptTuningConfig(**COMMON),
    "p-tuning mlp": lambda: PromptEncoderConfig(**COMMON, encoder_hidden_size=24),
    "p-tuning lstm": lambda: PromptEncoderConfig(
        **COMMON, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
    ),
    "multitask": lambda: MultitaskPromptTuningConfig(**COMMON, num_tasks=TASKS, num_ranks=2),
}
LENGTHS = (7, 12, 4, 9)


def build(prompt: str, base: str = "llama") -> nn.Module:
    """Return a model with weights that are far from trivial."""
    torch.manual_seed(0)
    kind, config = BASES[base]
    model = get_peft_model(kind(copy.deepcopy(config)).requires_grad_(False), PROMPTS[prompt]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model.train()


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def batch(prompt: str, filler: tuple[int, ...] = ()) -> MicroBatch:
    """Return the sequences in one flat row; the first three tokens of each are its prompt."""
    rows = [*sequences(), *(torch.zeros(length, dtype=torch.int64) for length in filler)]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    owners = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
    input_ids = torch.cat(rows)
    position_ids = torch.arange(len(input_ids)) - offsets[owners]
    predicted = torch.nonzero((position_ids >= 3) & (owners < len(LENGTHS))).flatten()
    return MicroBatch(
        rows=np.arange(len(LENGTHS)),
        input_ids=input_ids,
        position_ids=position_ids,
        cu_seqlens=offsets.int(),
        max_length=max(map(len, rows)),
        targets=input_ids[predicted],
        target_positions=predicted - 1,
        target_rows=owners[predicted],
        tokens=sum(LENGTHS),
        task_ids=torch.tensor([0, 2, 1, 2]) if prompt == "multitask" else None,
    )


def reference(model: nn.Module, part: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return logits of the targets, the loss sum and the gradients by PEFT's forward on padded, masked rows."""
    model = copy.deepcopy(model)
    ids = nn.utils.rnn.pad_sequence(sequences(), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in sequences()], batch_first=True)
    tasks = {} if part.task_ids is None else {"task_ids": part.task_ids}
    logits = model(input_ids=ids, attention_mask=mask, **tasks).logits[:, -ids.shape[1] :]
    wanted = mask.bool().clone()
    wanted[:, :3] = False
    logits = logits[:, :-1][wanted[:, 1:]]
    loss = nn.functional.cross_entropy(logits, ids[:, 1:][wanted[:, 1:]], reduction="sum")
    loss.backward()
    return logits.detach(), loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, part: MicroBatch, tolerance: float = 2e-5) -> None:
    logits, loss, expected = reference(model, part)
    result = target_loss(model, part)
    torch.testing.assert_close(result.loss_sum.detach(), loss, rtol=1e-5, atol=0)
    result.loss_sum.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance * float(gradient.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(target_logits(model, part), logits, rtol=1e-4, atol=1e-4)
        assert target_states(model, part).shape[0] == len(part.targets)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_flat_rows_as_peft_pads_them(prompt: str) -> None:
    model = build(prompt)
    assert supports_padding_free(unwrapped(model))
    assert_same(model, batch(prompt))


@pytest.mark.parametrize("base", [name for name in BASES if name != "llama"])
@pytest.mark.parametrize("prompt", ["prefix", "p-tuning mlp", "multitask"])
def test_other_bases(base: str, prompt: str) -> None:
    model = build(prompt, base)
    assert supports_padding_free(unwrapped(model)) == ("padded" not in base)
    assert_same(model, batch(prompt))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_filler_sequences_change_nothing(prompt: str) -> None:
    model = build(prompt)
    assert_same(model, batch(prompt, filler=(12, 5)))


@pytest.mark.parametrize("prompt", ["prompt", "prefix"])
def test_layers_as_transformers_wrote_them(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert_same(build(prompt), batch(prompt))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("prompt", ["prefix", "prefix with projection", "p-tuning mlp", "multitask"])
@pytest.mark.parametrize("fused", [True, False])
def test_gradient_checkpointing(base: str, prompt: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, str(int(fused)))
    model = build(prompt, base)
    plain, part = copy.deepcopy(model), batch(prompt)
    enable_checkpointing(model, layers=1.0)
    layers = _count_layer_calls(model)
    for other in (plain, model):
        target_loss(other, part).loss_sum.backward()
    if not fused:  # whose layers call no module
        assert layers[0] == 2 * SHAPE["num_hidden_layers"], "each layer runs again for its gradients"
    expected, found = gradients(plain), gradients(model)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def _count_layer_calls(model: nn.Module) -> list[int]:
    """Return a count of how often attention runs."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    for name, module in unwrapped(model).named_modules():
        if name.endswith((".self_attn", ".attn")):
            module.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("prompt", ["prefix", "prompt"])
def test_equal_lengths(prompt: str) -> None:
    """Rows of one length have a layout of their own in the attention, which must not take a prefix for tokens."""
    model, rows = build(prompt), torch.stack([sequences()[1], sequences()[1].flip(0)])
    count, length = rows.shape
    places = torch.arange(rows.numel())
    predicted = places[places % length > 0]
    part = MicroBatch(
        rows=np.arange(count),
        input_ids=rows.flatten(),
        position_ids=places % length,
        cu_seqlens=torch.tensor([0, length, 2 * length], dtype=torch.int32),
        max_length=length,
        targets=rows.flatten()[predicted],
        target_positions=predicted - 1,
        target_rows=predicted // length,
        tokens=rows.numel(),
    )
    with torch.no_grad():
        expected = model(input_ids=rows).logits[:, -length:-1].flatten(0, 1)
        torch.testing.assert_close(target_logits(model, part), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_switched_off_adapter_is_the_base(prompt: str) -> None:
    model, part = build(prompt), batch(prompt)
    with torch.no_grad():
        base = target_loss(unwrapped(model), part).loss_sum
        assert abs(float(target_loss(model, part).loss_sum) / float(base) - 1) > 1e-4
        with model.disable_adapter():
            assert virtual_tokens(model) is None
            assert torch.equal(target_loss(model, part).loss_sum, base)


def test_tasks_must_be_known() -> None:
    model = build("multitask")
    assert needs_tasks(model)
    assert not needs_tasks(build("prompt"))
    assert not needs_tasks(unwrapped(model))
    with pytest.raises(ModelError, match="task_column"):
        target_loss(model, batch("prompt"))
