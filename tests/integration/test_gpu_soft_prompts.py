"""On a GPU: flash attention behind a prefix, and soft prompts in 16 bits and over quantised bases, as on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import ludwig_peft_plugin.adapters  # noqa: F401 (registers the types)
from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
from ludwig_peft_plugin.engine.prefix_attention import _padded, prefixed_attention
from ludwig_peft_plugin.engine.virtual_tokens import needs_tasks
from ludwig_peft_plugin.model.generation import generate_answers, generation_settings
from ludwig_peft_plugin.training.loss import target_loss

pytestmark = pytest.mark.gpu

VOCABULARY, COUNT = 512, 9
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LENGTHS = (70, 128, 3, 41, 64)
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("prefix_tuning", {}),
    "projected prefix": ("prefix_tuning", {"prefix_projection": True}),
    "prompt": ("prompt_tuning", {}),
    "lstm": ("p_tuning", {"encoder_reparameterization_type": "LSTM"}),
    "multitask": ("multitask_prompt_tuning", {"task_column": "task", "num_tasks": 3}),
    "adaption": ("adaption_prompt", {}),
}
QUANTIZED = {
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    8: BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("lengths", [LENGTHS, (64, 64, 64)], ids=["uneven", "even"])
def test_flash_attention_behind_a_prefix(lengths: tuple[int, ...], window: int | None) -> None:
    """The kernel's causal limit counts from the ends of queries and keys; float64 on the CPU is the reference."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    key_starts = starts + COUNT * torch.arange(len(starts), dtype=torch.int32)

    def numbers(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, 32, generator=generator, dtype=torch.float64)

    inputs = (numbers(int(starts[-1]), 8), numbers(int(key_starts[-1]), 2), numbers(int(key_starts[-1]), 2))
    longest = (max(lengths), max(lengths) + COUNT)
    upstream = numbers(int(starts[-1]), 8)

    def run(device: str, dtype: torch.dtype, attend: Any) -> list[torch.Tensor]:
        given = [tensor.clone().to(device, dtype).requires_grad_() for tensor in inputs]
        places = (starts.to(device), key_starts.to(device), longest)
        output = attend(*given, *places, 32**-0.5, window)
        output.backward(upstream.to(device, dtype))
        return [output.detach(), *(tensor.grad for tensor in given)]

    expected = run("cpu", torch.float64, _padded)
    for found, wanted in zip(run("cuda", torch.bfloat16, prefixed_attention), expected, strict=True):
        error = (found.double().cpu() - wanted).norm() / wanted.norm()
        assert error < 1e-2


def build(prompt: str, folder: str, device: str, dtype: torch.dtype, bits: int | None = None) -> Any:
    extra = {} if bits is None else {"quantization_config": QUANTIZED[bits]}
    place = device if bits else "cpu"  # where random numbers of the start are drawn, too
    base = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": place}, **extra)
    kind, options = PROMPTS[prompt]
    size = {} if kind == "adaption_prompt" else {"num_virtual_tokens": COUNT, "init": "sample_vocab"}
    torch.manual_seed(3)
    model = attach_adapter(base.requires_grad_(False), adapter_registry[kind](**{**size, **options}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.device)
    return model.train() if bits else model.to(device).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1)).save_pretrained(path)
    return path


def batch(model: Any, device: str) -> MicroBatch:
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    owners = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    input_ids = torch.randint(3, VOCABULARY, (int(offsets[-1]),), generator=torch.Generator().manual_seed(2))
    position_ids = torch.arange(len(input_ids)) - offsets[owners]
    predicted = torch.nonzero(position_ids >= 2).flatten()
    tasks = torch.tensor([0, 1, 2, 1, 0]) if needs_tasks(model) else None
    return MicroBatch(
        rows=np.arange(len(LENGTHS)),
        input_ids=input_ids,
        position_ids=position_ids,
        cu_seqlens=offsets.int(),
        max_length=max(LENGTHS),
        targets=input_ids[predicted],
        target_positions=predicted - 1,
        target_rows=owners[predicted],
        tokens=len(input_ids),
        task_ids=tasks,
    ).to(device)


def step(model: Any, device: str) -> tuple[float, torch.Tensor]:
    """Return the mean loss and all gradients in one row."""
    model.zero_grad()
    part = batch(model, device)
    loss = target_loss(model, part).loss_sum / part.target_tokens
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
    return float(loss), torch.cat([p.grad.flatten().double().cpu() for p in trained])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_steps_as_on_the_cpu(prompt: str, folder: str) -> None:
    expected_loss, expected = step(build(prompt, folder, "cpu", torch.float32), "cpu")
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 8e-2)):
        model = build(prompt, folder, "cuda", dtype)
        loss, found = step(model, "cuda")
        assert loss == pytest.approx(expected_loss, rel=tolerance / 5)
        assert float((found - expected).norm() / expected.norm()) < tolerance
        enable_checkpointing(model)
        again_loss, again = step(model, "cuda")
        assert again_loss == pytest.approx(loss, rel=1e-3)
        assert float((again - found).norm() / found.norm()) < 1e-2
        again_loss, _ = step(model, "cuda")  # a size that comes again is where a CUDA graph would take over
        assert again_loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_quantised_bases_learn(prompt: str, bits: int, folder: str) -> None:
    model = build(prompt, folder, "cuda", torch.bfloat16, bits)
    enable_checkpointing(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss, _ = step(model, "cuda")
        losses.append(loss)
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_batched_answers_are_those_of_single_prompts(prompt: str, folder: str) -> None:
    model = build(prompt, folder, "cuda", torch.float32).eval()
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, VOCABULARY, n).astype(np.int32) for n in (3, 17, 1, 9, 30)]
    tasks = np.array([0, 1, 2, 1, 0])

    class Tokenizer:
        eos_token_id, pad_token_id = 2, 0

    config = generation_settings({"do_sample": False, "max_new_tokens": 10}, Tokenizer, model)
    device = torch.device("cuda")
    batched = generate_answers(model, prompts, config, device=device, tasks=tasks)
    for place, row in enumerate(prompts):
        (single,) = generate_answers(model, [row], config, device=device, tasks=tasks[place : place + 1])
        assert single.tokens.tolist() == batched[place].tokens.tolist()
