"""Train the shipped base model, a small Llama with its own byte-level BPE, on the Python standard library's source.

    python scripts/stdlib_corpus.py --out corpus.json.gz
    python scripts/train_base_model.py --corpus corpus.json.gz --dataset datasets/stdlib_instructions.csv --out OUT

`--smoke` runs the whole path on a few files in under a minute on a CPU. The dataset is only measured, never trained on.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from base_model_card import model_card
from base_model_training import evaluate, rows_of, train
from stdlib_corpus import build_corpus
from stdlib_source import library_root
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 1024
SIZE_LIMIT = 7_900_000  # bytes of the whole folder
PROMPT = "### Instruction: {instruction}\n### Input: {input}\n### Response: "


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text round-trips, nothing is unknown, and no token is added on its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_config(args: argparse.Namespace, eos: int) -> LlamaConfig:
    """The architecture. All widths are multiples of 64, so that 4-bit blocks divide them."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one int64 sequence, each followed by eos."""
    eos = tokenizer.eos_token_id
    ids = [id_ for encoded in tokenizer.backend_tokenizer.encode_batch(texts) for id_ in [*encoded.ids, eos]]
    return torch.tensor(ids, dtype=torch.long)


@torch.no_grad()
def response_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> dict[str, float]:
    """Mean loss in nats per token of the rows' outputs after the prompt, with and without the final eos."""
    total = eos_total = 0.0
    tokens = 0
    for row in rows:
        prompt = tokenizer(PROMPT.format(instruction=row["instruction"], input=row["input"]))["input_ids"]
        target = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([[*prompt, *target]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        losses = functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none")
        total += float(losses.sum())
        eos_total += float(losses[-1])
        tokens += len(target)
    without = (total - eos_total) / (tokens - len(rows))
    return {"with_eos": round(total / tokens, 4), "without_eos": round(without, 4), "tokens": tokens}


def load_corpus(args: argparse.Namespace) -> dict[str, Any]:
    """The corpus from a file, or built from the running Python; a single package of it for a smoke run."""
    if args.corpus is None:
        return build_corpus(library_root() / "asyncio" if args.smoke else None)
    with gzip.open(args.corpus, "rt", encoding="utf-8") as stream:
        corpus: dict[str, Any] = json.load(stream)
    if args.smoke:
        corpus |= {part: corpus[part][:count] for part, count in (("train", 40), ("heldout", 2))}
    return corpus


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights, configuration and tokenizer, small and free of paths."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # One line instead of a line a token: less than half the size.
    vocabulary = out / "tokenizer.json"
    content = json.loads(vocabulary.read_text(encoding="utf-8"))
    vocabulary.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    # The class name that transformers 4 and 5 both load.
    settings = out / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / "model.safetensors").chmod(0o644)


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` overrides what makes a run long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--corpus", type=Path, help="file made by stdlib_corpus.py; built here if not given")
    parser.add_argument("--dataset", type=Path, help="CSV whose test split is measured after training")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--length", type=int, default=CONTEXT, help="tokens in a training row")
    parser.add_argument("--rows", type=int, default=32, help="rows in a batch")
    parser.add_argument("--epochs", type=float, default=84)
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of --epochs")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.15, help="of embeddings and of each block's output")
    parser.add_argument("--evaluations", type=int, default=16, help="held-out measurements during the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: twice as fast on a GPU")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few files")
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.length, args.steps, args.evaluations = 2, 128, 6, 2
    return args


def main() -> None:
    """Corpus, tokenizer, training, measurements, folder."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    corpus = load_corpus(args)
    tokenizer = train_tokenizer(corpus["train"])
    stream = encode_documents(tokenizer, corpus["train"]).to(args.device)
    held_stream = encode_documents(tokenizer, corpus["heldout"]).to(args.device)
    held = rows_of(held_stream, args.length)[: 8 if args.smoke else None]
    model = LlamaForCausalLM(make_config(args, tokenizer.eos_token_id)).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} training and {len(held_stream):,} held-out tokens", flush=True)
    start = time.perf_counter()
    curve = train(model, stream, held, args)
    seconds = time.perf_counter() - start

    # What is measured is what is shipped: weights rounded to bfloat16, computed with in float32.
    model = model.to(torch.bfloat16)
    save(model, tokenizer, args.out)
    torch.set_float32_matmul_precision("highest")
    model = model.float().eval()
    loss = evaluate(model, held, args.rows)
    held_bytes = sum(len(text.encode()) for text in corpus["heldout"])
    report: dict[str, Any] = {
        "heldout_loss": round(loss, 4),
        "heldout_perplexity": round(math.exp(loss), 4),
        "heldout_bits_per_byte": round(loss / math.log(2) * len(held_stream) / held_bytes, 4),
        "parameters": parameters,
        "train_tokens": len(stream),
        "heldout_tokens": len(held_stream),
        "train_files": len(corpus["train"]),
        "heldout_files": len(corpus["heldout"]),
        "corpus_python": corpus["python"],
        "arguments": {k: v for k, v in vars(args).items() if k not in {"out", "corpus", "dataset"}},
        "device": torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else "cpu",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "seconds": round(seconds, 1),
        "curve": curve,
    }
    if args.dataset is not None:
        with args.dataset.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "2"]
        report["dataset_test_response_loss"] = response_loss(model, tokenizer, rows[:4] if args.smoke else rows)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "README.md").write_text(model_card(report), encoding="utf-8")
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(json.dumps({key: value for key, value in report.items() if key != "curve"}), f"{size:,} bytes", flush=True)
    if size > SIZE_LIMIT:
        raise SystemExit(
            f"{args.out.name} has {size:,} bytes, more than {SIZE_LIMIT:,}: fewer layers or smaller widths"
        )


if __name__ == "__main__":
    main()
