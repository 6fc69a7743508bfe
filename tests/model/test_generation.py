"""Answers of a batch equal those of one prompt at a time, and their probabilities are the model's own."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from ludwig_peft_plugin.model.generation import generate_answers, generation_settings, slot_choice

VOCABULARY, END = 61, 7
CPU = torch.device("cpu")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.6,  # wide enough that answers differ from prompt to prompt and some of them end
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


def prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(8, VOCABULARY, n).astype(np.int32) for n in (3, 17, 1, 9, 9, 30, 2, 5)]


def settings(**changes: object) -> GenerationConfig:
    values = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [END], "pad_token_id": END}
    return GenerationConfig(**(values | changes))


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("pad", [END, 0], ids=["pad=eos", "own pad"])
def test_batched_equals_one_by_one(build, pad):
    model, config = build(), settings(pad_token_id=pad)
    batched = generate_answers(model, prompts(), config, batch_size=4, device=CPU)
    single = [generate_answers(model, [prompt], config, batch_size=1, device=CPU)[0] for prompt in prompts()]
    plain = plain_answers(model, config)
    assert [answer.tokens.tolist() for answer in batched] == plain
    assert [answer.tokens.tolist() for answer in single] == plain
    assert len({tuple(row) for row in plain}) > 4, "the answers must differ, or a mix-up would not show"


def test_probability_is_the_models_own():
    model, config = llama(), settings()
    for prompt, answer in zip(
        prompts(), generate_answers(model, prompts(), config, batch_size=3, device=CPU), strict=True
    ):
        ids = torch.tensor([*prompt, *answer.tokens]).long()[None]
        chances = model(ids).logits[0].softmax(-1).detach()
        expected = [float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(answer.tokens)]
        np.testing.assert_allclose(answer.probabilities, expected, rtol=1e-4)


def test_an_empty_prompt_still_gets_an_answer():
    answers = generate_answers(
        llama(), [np.array([], dtype=np.int32), prompts()[0]], settings(), batch_size=2, device=CPU
    )
    assert len(answers) == 2
    assert len(answers[0].tokens) > 0


class Tokenizer:
    eos_token_id = END
    pad_token_id = END


def test_settings_know_every_end_of_the_base():
    model = llama()
    model.generation_config.eos_token_id = [3, 5]
    config = generation_settings({"max_new_tokens": 4, "do_sample": False, "temperature": 0.1}, Tokenizer(), model)
    assert config.eos_token_id == [3, 5, END]
    assert config.pad_token_id == END


def test_sampling_settings_take_effect():
    model = llama()
    config = generation_settings({"do_sample": True, "temperature": 5.0, "max_new_tokens": 12}, Tokenizer(), model)
    assert config.temperature == 5.0
    torch.manual_seed(0)
    first = generate_answers(model, prompts(), config, batch_size=8, device=CPU)
    torch.manual_seed(1)
    second = generate_answers(model, prompts(), config, batch_size=8, device=CPU)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(first, second, strict=True))


class TestSlotsOrPadded:
    """Which settings generate in the engine's slots; the others give the same answers in padded batches."""

    @pytest.mark.parametrize(
        ("changes", "in_slots"),
        [
            ({}, True),
            ({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}, True),
            ({"suppress_tokens": [9]}, True),
            ({"num_beams": 2}, False),
            ({"repetition_penalty": 1.3}, False),
            ({"no_repeat_ngram_size": 2}, False),
            ({"min_new_tokens": 3}, False),
            ({"bad_words_ids": [[9]]}, False),
            ({"max_time": 60.0}, False),
            ({"use_cache": False}, False),
            ({"max_new_tokens": None, "max_length": 40}, False),
        ],
    )
    def test_by_setting(self, changes, in_slots):
        assert (slot_choice(llama(), settings(**changes), CPU) is not None) == in_slots

    @pytest.mark.parametrize(
        "changes",
        [
            {"repetition_penalty": 1.5},
            {"no_repeat_ngram_size": 2},
            {"min_new_tokens": 6},
            {"bad_words_ids": [[9], [10, 11]]},
            {"num_beams": 3},
            {"prompt_lookup_num_tokens": 3},
            {"use_cache": False},
        ],
    )
    def test_padded_batches_equal_single_prompts(self, changes):
        model, config = llama(), settings(**changes)
        batched = generate_answers(model, prompts(), config, batch_size=4, device=CPU)
        assert [answer.tokens.tolist() for answer in batched] == plain_answers(model, config)

    def test_what_the_base_itself_prefers_counts(self):
        model = llama()
        model.generation_config.repetition_penalty = 1.3
        assert slot_choice(model, settings(), CPU) is None

    def test_memory_that_runs_out_halves_padded_batches(self, monkeypatch, caplog):
        model, config, real = llama(), settings(num_beams=2), LlamaForCausalLM.generate

        def generate(self, *args, **kwargs):
            if len(kwargs.get("input_ids", ())) > 2:
                raise torch.OutOfMemoryError("no memory")
            return real(self, *args, **kwargs)

        expected = plain_answers(model, config)
        monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
        made = generate_answers(model, prompts(), config, device=CPU)
        assert [answer.tokens.tolist() for answer in made] == expected
        assert "Memory ran out" in caplog.text


def plain_answers(model, config) -> list[list[int]]:
    """transformers' own answers, one unpadded prompt at a time."""
    answers = []
    for prompt in prompts():
        ids = torch.from_numpy(prompt).long()[None]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
        out = out.tolist()
        answers.append(out[: out.index(END)] if END in out else out)
    return answers


def with_adapter(config) -> object:
    torch.manual_seed(2)
    return get_peft_model(llama(), config).eval()


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # transformers gives them to PEFT
@pytest.mark.parametrize(
    ("adapter", "in_slots"),
    [
        (LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False), True),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), False),
    ],
    ids=["lora", "prompt tuning"],
)
def test_adapters_are_part_of_the_answers(adapter, in_slots):
    model, config = with_adapter(adapter), settings()
    assert (slot_choice(model, config, CPU) is not None) == in_slots
    expected = plain_answers(model, config)
    made = generate_answers(model, prompts(), config, device=CPU, batch_size=3)
    assert [answer.tokens.tolist() for answer in made] == expected
    assert expected != plain_answers(llama(), config)


def test_a_streamer_gets_the_tokens_as_they_are_made():
    seen = []

    class Streamer(BaseStreamer):
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    model, config, prompt = llama(), settings(), prompts()[1]
    (answer,) = generate_answers(model, [prompt], config, device=CPU, streamer=Streamer())
    assert seen[: len(prompt)] == prompt.tolist()
    assert seen[len(prompt) : len(prompt) + len(answer.tokens)] == answer.tokens.tolist()
    assert seen[-1] == "end"


def test_nothing_to_generate_for():
    assert generate_answers(llama(), [], settings(), device=CPU) == []
