"""Train a small BERT with its own WordPiece vocabulary on the functions of the Python standard library.

    python scripts/train_small_bert.py --out OUT

It is the encoder of `configs/encoder_lora_tabular.yaml` and of `benchmarks/encoder_lora.py`. It sees no function of the
validation and test rows of `datasets/make_stdlib_areas.py`. Two tasks at once, as in DeCLUTR (Giorgi et al. 2021):
masked words, and finding among the functions of a batch the one of the same file. Three minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
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


class Functions:
    """The code of many functions as token ids, on the device that trains.

    Attributes:
        files: which file each function is from, shape (n,), int64, ascending.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, files: list[list[str]], device: str) -> None:
        codes = [code for file in files for code in file]
        rows: list[list[int]] = tokenizer(codes, add_special_tokens=False)["input_ids"]
        self.files = torch.tensor([number for number, file in enumerate(files) for _ in file], device=device)
        self._tokens = torch.tensor([token for row in rows for token in row], device=device)
        self._lengths = torch.tensor([len(row) for row in rows], device=device)
        self._starts = self._lengths.cumsum(0) - self._lengths

    def __len__(self) -> int:
        return len(self.files)

    def windows(self, indices: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """As much of functions `indices` (n,) as the context holds, in special tokens, shape (n, CONTEXT).

        Args:
            indices: which functions.
            generator: lets a share of the windows begin anywhere in a function; None lets all begin with its head.
        """
        device, size = indices.device, CONTEXT - 2
        lengths, starts = self._lengths[indices], self._starts[indices]
        if generator is not None:
            chance = torch.rand(2, len(indices), device=device, generator=generator)
            room = (lengths - size).clamp(min=0) + 1
            offsets = (chance[0] * room).long() * (chance[1] < MOVED)
            lengths, starts = lengths - offsets, starts + offsets
        places = torch.arange(size, device=device)
        tokens = self._tokens[(starts[:, None] + places).clamp(max=len(self._tokens) - 1)]
        result = torch.full((len(indices), CONTEXT), SPECIAL.index("[PAD]"), device=device)
        result[:, 0] = SPECIAL.index("[CLS]")
        result[:, 1:-1] = tokens.where(places < lengths[:, None], result[:, 1:-1])
        return result.scatter(1, lengths.clamp(max=size)[:, None] + 1, SPECIAL.index("[SEP]"))


def pairs(functions: Functions, generator: np.random.Generator) -> np.ndarray:
    """Functions of the same file in pairs, new ones at each call, in random order, (pairs, 2); odd ones are out."""
    order = generator.permutation(len(functions))
    files = functions.files.cpu().numpy()[order]
    order = order[np.argsort(files, kind="stable")]
    counts = np.bincount(files)
    keep = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts) < np.repeat(counts // 2 * 2, counts)
    return generator.permutation(order[keep].reshape(-1, 2))


def mask(batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels: of the chosen tokens 8 in 10 are `[MASK]`, one is random, one stays (Devlin et al. 2018)."""
    chosen_by, place = torch.rand(2, *batch.shape, device=batch.device, generator=generator)
    chosen = (chosen_by < MASKED) & (batch >= len(SPECIAL))
    noise = torch.randint(len(SPECIAL), VOCABULARY, batch.shape, device=batch.device, generator=generator)
    inputs = torch.where(chosen & (place < 0.8), SPECIAL.index("[MASK]"), batch)
    return torch.where(chosen & (place >= 0.9), noise, inputs), batch.masked_fill(~chosen, IGNORED)


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


def measure(model: BertForMaskedLM, functions: Functions, size: int) -> float:
    """Mean loss in nats of masked tokens of the functions' heads, with the same masks at every call."""
    device = functions.files.device
    generator = torch.Generator(device).manual_seed(0)
    model.eval()
    with torch.no_grad():
        losses = []
        for indices in torch.arange(len(functions), device=device).split(size):
            inputs, labels = mask(functions.windows(indices), generator)
            losses.append(masked_loss(model, hidden_states(model, inputs)[0], labels))
    model.train()
    return float(torch.stack(losses).mean())


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: linear over the first tenth, then a cosine to zero."""
    warm_up = 0.1 * steps
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * max(0.0, step - warm_up) / (0.9 * steps)))


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
    functions = Functions(tokenizer, [codes for codes in train if len(codes) > 1], args.device)
    held = Functions(tokenizer, [measured], args.device)
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
    steps, half = int(args.epochs * len(functions) / args.batch), args.batch // 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    generator, order = torch.Generator(args.device).manual_seed(args.seed), np.random.default_rng(args.seed)
    curve: list[dict[str, Any]] = []
    started, step = time.perf_counter(), 0
    while step < steps:
        for chunk in torch.from_numpy(pairs(functions, order)).to(args.device).split(half):
            chosen = chunk.T.reshape(-1)  # rows i and i + half are of one file
            inputs, labels = mask(functions.windows(chosen, generator), generator)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                hidden, attention = hidden_states(model, inputs)
                words = masked_loss(model, hidden, labels)
            partners = file_loss(hidden.float(), attention, functions.files[chosen])
            (words + partners).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % max(1, steps // 10) == 0 or step == steps:
                held_loss = round(measure(model, held, args.batch), 4)
                curve.append({"step": step, "heldout_loss": held_loss, "batch_file_loss": round(partners.item(), 4)})
                print(f"step {step}/{steps} {curve[-1]} {time.perf_counter() - started:.0f} s", flush=True)
            if step == steps:
                break
    # The dropout of fine-tuning is BERT's own.
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    model.config.architectures = ["BertForMaskedLM"]
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "functions": len(functions),
        "epochs": args.epochs,
        "batch": args.batch,
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
