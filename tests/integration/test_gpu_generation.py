"""Generation on a GPU: recorded steps give the answers of eager ones, and nothing in a step waits for the host."""

import gc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from ludwig_peft_plugin.decoding import session, step
from ludwig_peft_plugin.decoding.memory import SlotBudget
from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.model import generation
from ludwig_peft_plugin.model.base_model import resolve_base_model
from ludwig_peft_plugin.model.generation import generate_answers

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def load(quantization=None, dtype=torch.float32):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        resolve_base_model("tiny-llama-python"), dtype=dtype, device_map={"": 0}, quantization_config=quantization
    )
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="gaussian")
    return get_peft_model(base, adapter).eval()


def nf4():
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )


@pytest.fixture(scope="module")
def prompts():
    generator = np.random.default_rng(0)
    return [generator.integers(300, 4000, n).astype(np.int32) for n in generator.integers(2, 120, 40)]


def settings(**changes):
    # A few ordinary tokens end answers too, so that slots are refilled.
    values = {"do_sample": False, "max_new_tokens": 48, "eos_token_id": list(range(0, 4096, 40)), "pad_token_id": 0}
    return GenerationConfig(**(values | changes))


@pytest.fixture
def recordings(monkeypatch):
    """How many slots each recorded step has."""
    seen = []
    real = step.Steps._record

    def record(self):
        real(self)
        if self._graph is not None:
            seen.append(self.cache.slots)

    monkeypatch.setattr(step.Steps, "_record", record)
    return seen


@contextmanager
def eager():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "can_record", lambda base, device: False)
        yield


def texts(model, prompts, config, batch_size=None):
    return [a.tokens.tolist() for a in generate_answers(model, prompts, config, device=CUDA, batch_size=batch_size)]


@pytest.mark.parametrize("quantization", [None, nf4], ids=["float32", "nf4"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_recorded_equals_eager_and_single(prompts, recordings, quantization, batch_size):
    model, config = load(quantization() if quantization else None), settings()
    made = texts(model, prompts, config, batch_size)
    assert recordings
    with eager():
        assert texts(model, prompts, config, batch_size) == made
        assert texts(model, prompts[:6], config, 1) == made[:6]
    assert len({tuple(answer) for answer in made}) > 20
    assert len({len(answer) for answer in made}) > 5


def test_recorded_steps_follow_growing_slots(prompts, recordings, monkeypatch):
    model, config = load(), settings(max_new_tokens=150, eos_token_id=[0])
    with eager():
        expected = texts(model, prompts, config)
    monkeypatch.setattr(session, "GRANULE", 32)
    monkeypatch.setattr(session, "HEADROOM", 20)
    assert texts(model, prompts, config, 5) == expected
    assert len(recordings) > 2


def test_sampled_answers_do_not_depend_on_the_batch(prompts, recordings):
    model, config = load(), settings(do_sample=True, temperature=1.2, top_k=50, top_p=0.9)
    runs = []
    for batch_size in (None, 9):
        torch.manual_seed(3)
        runs.append(texts(model, prompts, config, batch_size))
    assert runs[0] == runs[1]
    assert recordings


def test_probabilities_are_the_models_own(prompts):
    model = load()
    for prompt, answer in list(zip(prompts, generate_answers(model, prompts, settings(), device=CUDA), strict=True))[
        :5
    ]:
        ids = torch.tensor([*prompt, *answer.tokens], device=CUDA).long()[None]
        with torch.no_grad():
            chances = model(ids).logits[0].float().softmax(-1)
        expected = [float(chances[len(prompt) - 1 + i, token]) for i, token in enumerate(answer.tokens)]
        np.testing.assert_allclose(answer.probabilities, expected, rtol=2e-3)


def test_bfloat16_is_recorded(prompts, recordings):
    answers = generate_answers(load(dtype=torch.bfloat16), prompts, settings(), device=CUDA)
    assert recordings
    assert all(np.isfinite(answer.probabilities).all() for answer in answers)


def test_eight_bit_bases_are_not_recorded_and_answer(prompts, recordings):
    model = load(BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float16)
    assert len(texts(model, prompts[:4], settings())) == 4
    assert not recordings


def test_a_step_that_cannot_be_recorded_runs_eagerly_and_says_so(prompts, recordings, caplog):
    model, config = load(), settings()
    expected = texts(model, prompts, config)
    recordings.clear()
    layer = unwrapped(model).model.layers[1]
    hook = layer.register_forward_hook(lambda module, args, output: (float(output.sum()), output)[1])
    assert texts(model, prompts, config) == expected
    assert not recordings
    assert "cannot be recorded as a CUDA graph" in caplog.text
    dropped = torch.nn.functional.dropout(torch.ones(1000, device=CUDA), p=0.5)
    assert 300 < int(dropped.count_nonzero()) < 700, "training after it draws random numbers as before"
    hook.remove()
    assert texts(model, prompts, config) == expected, "recording works again"
    assert recordings


def test_nothing_in_a_step_waits_for_the_host(prompts, monkeypatch):
    real = step.Steps._step

    def checked(self, length):
        torch.cuda.set_sync_debug_mode("error")
        try:
            real(self, length)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(step.Steps, "_step", checked)
    with eager():
        assert texts(load(), prompts[:4], settings())


def test_memory_is_given_back(prompts):
    model = load()
    texts(model, prompts[:2], settings())
    gc.collect()
    before = torch.cuda.memory_allocated()
    texts(model, prompts, settings())
    gc.collect()
    workspace = 2**25  # cuBLAS makes one for each stream it meets, and keeps it
    assert torch.cuda.memory_allocated() <= before + workspace + 2**20


def test_as_many_slots_as_memory_holds():
    base = unwrapped(load())
    free, total = torch.cuda.mem_get_info()
    budget = SlotBudget(base, CUDA)
    assert 0 < budget.bytes < total
    token = 2 * 5 * 2 * 32 * 4  # keys and values, layers, key heads, their size, float32
    capacity = 64 * 1024
    assert budget.slots(capacity) * capacity * token < free
    assert budget.slots(512) == 512
