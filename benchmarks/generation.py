"""Time the generation of answers to prompts of mixed length: in slots, in padded batches, and one at a time.

usage: python -m benchmarks.generation [--model tiny|1b|8b] [--prompts 256] [--new-tokens 128] [--out OUT.json]

`tiny` is the shipped model in float32; `1b` and `8b` are Llama shapes with random weights in bfloat16, for a GPU. All
have a LoRA on every linear layer. Each way answers the same prompts twice over: `full` lets every answer run to the
last token, `mixed` ends answers at some ordinary tokens as well, so that they are of very different lengths.

The ways: `slots` is what the plugin does, on a GPU also without CUDA graphs (`slots_eager`); `padded` is transformers'
`generate` in left-padded batches of 16, with one more pass for the probabilities, which is what the plugin did before;
`single` is one prompt at a time with scores, as stock Ludwig does, on the first few prompts. Seconds are those of the
clock on a GPU, and of this process alone on a CPU, which others may be using too; give it one thread there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from benchmarks.gpu.rows import TEMPLATE, question_rows
from benchmarks.record import provenance
from ludwig_peft_plugin.model import generation
from ludwig_peft_plugin.model.base_model import resolve_base_model
from ludwig_peft_plugin.model.generation import generate_answers
from ludwig_peft_plugin.model.padded_generation import generate_padded

ROOT = Path(__file__).resolve().parent.parent
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}
SINGLE_PROMPTS = 8
END_SHARE = 0.02  # of the vocabulary ends `mixed` answers of random weights: about 50 tokens on average

Tokens = list[list[int]]


def build(name: str, device: torch.device, tokenizer: Any) -> Any:
    """Return the model with its adapter, in evaluation mode."""
    if name == "tiny":
        base = AutoModelForCausalLM.from_pretrained(resolve_base_model("tiny-llama-python"), dtype=torch.float32)
    else:
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = LlamaConfig(**SHAPES[name], **ends, max_position_embeddings=8192)
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(base.to(device), adapter).eval()


def ends_of(name: str, tokenizer: Any, vocabulary: int) -> list[int]:
    """Return the tokens that end a `mixed` answer: ends of lines, or some random tokens where weights are random."""
    if name == "tiny":
        return [token for token in range(len(tokenizer)) if tokenizer.decode([token]).endswith("\n")]
    return np.random.default_rng(0).choice(vocabulary, int(END_SHARE * vocabulary), replace=False).tolist()


def single(model: Any, prompts: list[np.ndarray], config: GenerationConfig, device: torch.device) -> Tokens:
    """Generate as stock Ludwig does."""
    answers = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            return_dict_in_generate=True,
            output_scores=True,
        )
        answer = made.sequences[0, len(prompt) :].tolist()
        end = next((place for place, token in enumerate(answer) if token in config.eos_token_id), len(answer))
        answers.append(answer[:end])
    return answers


def ways(model: Any, config: GenerationConfig, device: torch.device) -> dict[str, Callable[[list[np.ndarray]], Tokens]]:
    """Return each way of generating by name."""

    def slots(prompts: list[np.ndarray]) -> Tokens:
        return [answer.tokens.tolist() for answer in generate_answers(model, prompts, config, device=device)]

    def slots_eager(prompts: list[np.ndarray]) -> Tokens:
        can_record = generation.can_record
        generation.can_record = lambda base, device: False
        try:
            return slots(prompts)
        finally:
            generation.can_record = can_record

    def padded(prompts: list[np.ndarray]) -> Tokens:
        return [tokens.tolist() for tokens, _ in generate_padded(model, prompts, config, device=device)]

    found = {"slots": slots, "padded": padded, "single": lambda p: single(model, p[:SINGLE_PROMPTS], config, device)}
    return found | ({"slots_eager": slots_eager} if device.type == "cuda" else {})


def timed(way: Callable[[list[np.ndarray]], Tokens], prompts: list[np.ndarray], device: torch.device) -> dict[str, Any]:
    """Run one way once and return its tokens a second, with the answers."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    answers = way(prompts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    lengths = [len(answer) for answer in answers]
    result = {
        "prompts": len(answers),
        "tokens": sum(lengths),
        "seconds": round(seconds, 2),
        "tok_s": round(sum(lengths) / seconds, 1),
        "answer_lengths": [min(lengths), statistics.median(lengths), max(lengths)],
        "answers": answers,
    }
    if device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def main() -> None:
    """Time every way and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", *SHAPES], default="tiny")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(resolve_base_model("tiny-llama-python"))
    model = build(arguments.model, device, tokenizer)
    texts = [TEMPLATE.format(instruction=row["instruction"]) for row in question_rows(arguments.prompts)]
    prompts = [np.array(ids, dtype=np.int32) for ids in tokenizer(texts)["input_ids"]]
    lengths = [len(prompt) for prompt in prompts]
    results: dict[str, Any] = {}
    for kind in ("full", "mixed"):
        vocabulary = model.config.vocab_size
        # No token has this number: nothing ends a `full` answer.
        ends = [vocabulary] if kind == "full" else ends_of(arguments.model, tokenizer, vocabulary)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=arguments.new_tokens, eos_token_id=ends, pad_token_id=0
        )
        first: Tokens = []
        for name, way in ways(model, config, device).items():
            way(prompts[:4])  # workspaces and kernels are loaded
            result = timed(way, prompts, device)
            answers = result.pop("answers")
            first = first or answers
            same = sum(a == b for a, b in zip(first, answers, strict=False))
            results[f"{kind}/{name}"] = {**result, "answers_as_slots": same}
            print(f"{kind}/{name}: {results[f'{kind}/{name}']}", flush=True)
    record = {
        "what": f"{arguments.model}, LoRA r16 on all linears, {len(prompts)} prompts of {min(lengths)} to "
        f"{max(lengths)} tokens (median {statistics.median(lengths):g}), up to {arguments.new_tokens} new tokens",
        "results": results,
        "threads": torch.get_num_threads(),
        **provenance(),
    }
    out = arguments.out or ROOT / "benchmarks" / "results" / f"generation_{arguments.model}_{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
