"""Generation behind a soft prompt: batches give what single prompts give, which is PEFT's forward, token by token."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import ludwig_peft_plugin.adapters  # noqa: F401 (registers the types)
from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.engine.virtual_tokens import needs_tasks
from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.model.generation import generate_answers, slot_choice

VOCABULARY, END, NEW = 61, 7, 8
CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.6,  # wide enough that answers differ from prompt to prompt and some of them end
}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.5)
    ),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=64, query_pre_attn_scalar=8)),
}
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("prefix_tuning", {}),
    "projected prefix": ("prefix_tuning", {"prefix_projection": True}),
    "cartridge": ("cartridge", {}),
    "prompt": ("prompt_tuning", {}),
    "p-tuning": ("p_tuning", {}),
    "lstm": ("p_tuning", {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}),
    "multitask": ("multitask_prompt_tuning", {"task_column": "task", "num_tasks": 3}),
    "adaption": ("adaption_prompt", {}),
}
TASKS = np.array([0, 1, 2, 1, 0, 2])


def build(prompt: str, base: str = "llama") -> Any:
    torch.manual_seed(1)
    plain = BASES[base]().eval().requires_grad_(False)
    kind, options = PROMPTS[prompt]
    size = {} if kind == "adaption_prompt" else {"num_virtual_tokens": 5, "init": "sample_vocab"}
    model = attach_adapter(plain, adapter_registry[kind](**{**size, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(8, VOCABULARY, n).astype(np.int32) for n in (3, 17, 1, 9, 9, 5)]


def settings(**changes: Any) -> GenerationConfig:
    values = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": [END], "pad_token_id": END}
    return GenerationConfig(**(values | changes))


@torch.no_grad()
def by_hand(model: Any, prompt: np.ndarray, task: int) -> tuple[list[int], list[float]]:
    """Return the greedy answer and its probabilities by whole forward passes of PEFT, without a cache."""
    ids, answer, chances = torch.from_numpy(prompt.astype(np.int64))[None], [], []
    tasks = {"task_ids": torch.tensor([task])} if needs_tasks(model) else {}
    for _ in range(NEW):
        chance = model(input_ids=ids, **tasks).logits[0, -1].softmax(dim=-1)
        token = int(chance.argmax())
        if token == END:
            break
        answer.append(token)
        chances.append(float(chance[token]))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return answer, chances


def check(model: Any) -> None:
    config = settings()
    expected = [by_hand(model, prompt, int(task)) for prompt, task in zip(prompts(), TASKS, strict=True)]
    assert len({tuple(answer) for answer, _ in expected}) > 3, "the answers must differ, or a mix-up would not show"
    for size in (4, 1):
        answers = generate_answers(model, prompts(), config, device=CPU, batch_size=size, tasks=TASKS)
        assert [answer.tokens.tolist() for answer in answers] == [answer for answer, _ in expected]
        for answer, (_, chances) in zip(answers, expected, strict=True):
            np.testing.assert_allclose(answer.probabilities, chances, rtol=1e-3)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_batched_equals_one_by_one(prompt: str) -> None:
    check(build(prompt))


@pytest.mark.parametrize("base", [name for name in BASES if name != "llama"])
@pytest.mark.parametrize("prompt", ["prefix", "p-tuning", "multitask"])
def test_other_bases(prompt: str, base: str) -> None:
    check(build(prompt, base))


def test_an_adaption_prompt_on_gpt2() -> None:
    check(build("adaption", "gpt2"))


@pytest.mark.parametrize("prompt", ["prefix", "prompt", "multitask"])
@pytest.mark.parametrize(
    "changes", [{"num_beams": 3}, {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 1}], ids=str
)
def test_other_searches(prompt: str, changes: dict[str, Any]) -> None:
    model, config = build(prompt), settings(**changes)
    batched = generate_answers(model, prompts(), config, device=CPU, batch_size=4, tasks=TASKS)
    single = [
        generate_answers(model, [row], config, device=CPU, tasks=TASKS[place : place + 1])[0]
        for place, row in enumerate(prompts())
    ]
    assert [answer.tokens.tolist() for answer in batched] == [answer.tokens.tolist() for answer in single]
    greedy = generate_answers(model, prompts(), settings(), device=CPU, tasks=TASKS)
    assert [answer.tokens.tolist() for answer in batched] != [answer.tokens.tolist() for answer in greedy]


def test_virtual_tokens_are_no_text_to_a_penalty() -> None:
    """The first token of a row stands for virtual tokens where a search looks back: nothing new is penalised."""
    model = build("prompt")
    prompt = np.array([20, 21, 22], dtype=np.int32)
    (answer,) = generate_answers(model, [prompt], settings(repetition_penalty=1.4), device=CPU)
    ids, expected = torch.from_numpy(prompt.astype(np.int64))[None], []
    with torch.no_grad():
        for _ in range(NEW):
            scores = model(input_ids=ids).logits[0, -1]
            seen = ids[0].unique()
            scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 1.4, scores[seen] / 1.4)
            token = int(scores.argmax())
            if token == END:
                break
            expected.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert answer.tokens.tolist() == expected


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_switched_off_adapter_answers_as_the_base(prompt: str) -> None:
    model = build(prompt)
    trained = generate_answers(model, prompts(), settings(), device=CPU, tasks=TASKS)
    base = copy.deepcopy(model)
    with model.disable_adapter():
        off = generate_answers(model, prompts(), settings(), device=CPU, tasks=TASKS)
    with base.disable_adapter():
        plain = generate_answers(base.get_base_model(), prompts(), settings(), device=CPU)
    assert [answer.tokens.tolist() for answer in off] == [answer.tokens.tolist() for answer in plain]
    assert [answer.tokens.tolist() for answer in off] != [answer.tokens.tolist() for answer in trained]


def test_tasks_must_be_known() -> None:
    with pytest.raises(ModelError, match="task_column"):
        generate_answers(build("multitask"), prompts(), settings(), device=CPU)


def test_soft_prompts_leave_the_slots_to_others() -> None:
    assert slot_choice(build("prefix"), settings(), CPU) is None
