"""Train a small BERT with its own WordPiece vocabulary on the functions of the Python standard library.

    python scripts/train_small_bert.py --out OUT

It is the encoder of `configs/encoder_lora_tabular.yaml` and of `benchmarks/encoder_lora.py`. It sees no function of the
validation and test rows of `datasets/make_stdlib_areas.py`. Two tasks at once, as in DeCLUTR (Giorgi et al. 2021):
masked words, and finding among the functions of a batch the one of the same file. Three minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "datasets"))

from make_stdlib_areas import TRAIN, all_rows, code_of, shortened  # noqa: E402
from stdlib_source import Source, body_key, fraction, library_sources  # noqa: E402

# Ludwig masks the token of number 2 as padding, whatever the tokenizer says; so the padding is number 2 here.
SPECIAL = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
VOCABULARY = 4096
CONTEXT = 40
MASKED = 0.2
MOVED = 0.5  # share of the texts that begin anywhere in a function, not with its head
TEMPERATURE = 0.1
IGNORED = -100


def texts_of(sources: list[Source]) -> tuple[list[list[str]], list[str]]:
    """Code of functions to train on, by file, and to measure on (a hundredth); none is held out by the dataset."""
    held_out = [row for row in all_rows(sources) if row["split"] != TRAIN]
    keys = {row["key"] for row in held_out}
    codes = {row["code"].lower() for row in held_out}
    train: list[list[str]] = []
    measured: list[str] = []
    for source in sources:
        train.append([])
        for node, qualname, nested in source.functions:
            key = f"{source.path}:{qualname}"
            if nested or key in keys or not body_key(node):
                continue
            code = code_of(node)
            if shortened(code).lower() not in codes:
                (measured if fraction("bert " + key) < 0.01 else train[-1]).append(code)
    return train, measured


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """WordPiece in lower case, as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, whole and without special tokens."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def window(row: list[int], place: float = 0.0) -> list[int]:
    """As much of `row` as the context holds, in special tokens; `place` is 0 for its head and below 1 for its end."""
    length = CONTEXT - 2
    start = int(place * (max(0, len(row) - length) + 1))
    return [SPECIAL.index("[CLS]"), *row[start : start + length], SPECIAL.index("[SEP]")]


def padded(rows: list[list[int]]) -> torch.Tensor:
    """Token ids (rows, length of the longest)."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=SPECIAL.index("[PAD]"))


def batches(
    files: list[list[list[int]]], size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (size, length) and numbers of the files (size,) of one pass; rows i and i + size/2 are of one file.

    A file's functions are paired anew at each pass, and an odd one is left out; pairs of near lengths share a batch.
    """
    pairs = []
    for file, rows in enumerate(files):
        order = torch.randperm(len(rows), generator=generator).tolist()
        moved = torch.rand(len(rows), generator=generator) < MOVED
        places = (moved * torch.rand(len(rows), generator=generator)).tolist()
        texts = [window(rows[index], place) for index, place in zip(order, places, strict=True)]
        pairs += [(file, first, second) for first, second in zip(texts[::2], texts[1::2], strict=False)]
    pairs = [pairs[index] for index in torch.randperm(len(pairs), generator=generator).tolist()]
    half, pool = size // 2, 16 * size
    for start in range(0, len(pairs), pool):
        part = sorted(pairs[start : start + pool], key=lambda pair: max(len(pair[1]), len(pair[2])))
        chunks = [part[first : first + half] for first in range(0, len(part), half)]
        for place in torch.randperm(len(chunks), generator=generator).tolist():
            chunk = chunks[place]
            numbers = torch.tensor([pair[0] for pair in chunk])
            yield padded([pair[1] for pair in chunk] + [pair[2] for pair in chunk]), numbers.repeat(2)


def mask(batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels: of the chosen tokens 8 in 10 are `[MASK]`, one is random, one stays (Devlin et al. 2018)."""
    chosen = (torch.rand(batch.shape, generator=generator) < MASKED) & (batch >= len(SPECIAL))
    labels = batch.masked_fill(~chosen, IGNORED)
    place = torch.rand(batch.shape, generator=generator)
    noise = torch.randint(len(SPECIAL), VOCABULARY, batch.shape, generator=generator)
    inputs = torch.where(chosen & (place < 0.8), SPECIAL.index("[MASK]"), batch)
    return torch.where(chosen & (place >= 0.9), noise, inputs), labels


def masked_loss(model: BertForMaskedLM, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of the chosen tokens; the vocabulary's logits are computed for them alone."""
    wanted = labels != IGNORED
    return functional.cross_entropy(model.cls(hidden[wanted]), labels[wanted])


def file_loss(hidden: torch.Tensor, attention: torch.Tensor, files: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of finding a function's partner among the batch's functions of other files.

    The similarity is the cosine of the means of the last hidden states (NT-Xent, Chen et al. 2020).
    """
    means = (hidden * attention[..., None]).sum(1) / attention.sum(1, keepdim=True)
    vectors = functional.normalize(means, dim=-1)
    places = torch.arange(len(files), device=files.device)
    partner = places.roll(len(files) // 2)
    other = files[:, None] != files[None, :]
    other[places, partner] = True
    return functional.cross_entropy((vectors @ vectors.T / TEMPERATURE).masked_fill(~other, float("-inf")), partner)


def hidden_states(model: BertForMaskedLM, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states (rows, length, width) and the mask (rows, length) of what is no padding."""
    attention = (inputs != SPECIAL.index("[PAD]")).long()
    return model.bert(input_ids=inputs, attention_mask=attention).last_hidden_state, attention


def measure(model: BertForMaskedLM, rows: list[list[int]], size: int) -> float:
    """Mean loss in nats of masked tokens, with the same masks at every call."""
    generator = torch.Generator().manual_seed(0)
    rows = sorted(map(window, rows), key=len)
    model.eval()
    with torch.no_grad():
        losses = []
        for start in range(0, len(rows), size):
            inputs, labels = (part.to(model.device) for part in mask(padded(rows[start : start + size]), generator))
            losses.append(masked_loss(model, hidden_states(model, inputs)[0], labels))
    model.train()
    return float(torch.stack(losses).mean())


def main() -> None:
    """Train the tokenizer and the model, and write both with what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=100)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    train, measured = texts_of(library_sources())
    tokenizer = train_tokenizer([code for codes in train for code in codes])
    files, held = [encode(tokenizer, codes) for codes in train if len(codes) > 1], encode(tokenizer, measured)
    functions = sum(map(len, files))
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        intermediate_size=4 * args.hidden,
        max_position_embeddings=CONTEXT,
        pad_token_id=SPECIAL.index("[PAD]"),
        hidden_dropout_prob=0.0,  # it is small for as much text
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    steps = int(args.epochs * functions / args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    curve: list[dict[str, Any]] = []
    started, step, tokens = time.perf_counter(), 0, 0
    while step < steps:
        for batch, numbers in batches(files, args.batch, generator):
            inputs, labels = (part.to(args.device) for part in mask(batch, generator))
            hidden, attention = hidden_states(model, inputs)
            partners = file_loss(hidden, attention, numbers.to(args.device))
            (masked_loss(model, hidden, labels) + partners).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + batch.numel()
            if step % max(1, steps // 10) == 0 or step == steps:
                held_loss = round(measure(model, held, args.batch), 4)
                curve.append({"step": step, "heldout_loss": held_loss, "batch_file_loss": round(partners.item(), 4)})
                seconds = time.perf_counter() - started
                print(f"step {step}/{steps} {curve[-1]} {tokens / seconds:.0f} tokens/s {seconds:.0f} s", flush=True)
            if step == steps:
                break
    # The dropout of fine-tuning is BERT's own.
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    model.config.architectures = ["BertForMaskedLM"]
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "functions": functions,
        "epochs": args.epochs,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "curve": curve,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
