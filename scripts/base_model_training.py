"""The training loop of the shipped base model: rows cut from one long sequence of tokens, dropout, and the schedule."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import torch
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import LlamaForCausalLM


def rows_of(stream: torch.Tensor, length: int, offset: int = 0) -> torch.Tensor:
    """`stream` from `offset` as rows of length + 1 tokens, each starting with the last token of the one before."""
    return stream[offset:].unfold(0, length + 1, length)


def batches(stream: torch.Tensor, length: int, rows: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches (rows, length + 1) without end; every epoch cuts the sequence elsewhere and shuffles the rows."""
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        table = rows_of(stream, length, offset)
        order = torch.randperm(len(table), generator=generator)
        for chunk in order.split(rows):
            if len(chunk) == rows:
                yield table[chunk.to(stream.device)]


def token_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats of a batch (rows, length + 1)."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, table: torch.Tensor, rows: int) -> float:
    """Mean loss in nats per token over all rows."""
    model.eval()
    total = sum(token_loss(model, chunk).double() * len(chunk) for chunk in table.split(rows))
    model.train()
    return float(total) / len(table)


def add_dropout(model: LlamaForCausalLM, rate: float) -> list[RemovableHandle]:
    """Dropout, while training, of the embeddings and of what attention and feed-forward add; Llama has none itself."""

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, rate, module.training)

    places = [model.model.embed_tokens]
    places += [part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [place.register_forward_hook(drop) for place in places]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, held: torch.Tensor, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Train in place, leave the weights of the lowest held-out loss in `model`, and return the loss curve."""
    device = torch.device(args.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    hooks = add_dropout(model, args.dropout) if args.dropout else []
    loss_of = torch.compile(token_loss) if args.compile else token_loss
    source = batches(stream, args.length, args.rows, torch.Generator().manual_seed(args.seed))
    per_epoch = len(stream) // (args.length * args.rows)
    steps = args.steps or max(1, round(args.epochs * per_epoch))
    best, best_weights = math.inf, {}
    curve: list[dict[str, float]] = []
    recent: list[torch.Tensor] = []
    start = time.perf_counter()
    for step in range(steps):
        lr = learning_rate(step, steps, args.lr, min(args.warmup, steps // 10 + 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast:
            loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if (step + 1) % max(1, steps // args.evaluations) == 0 or step + 1 == steps:
            with autocast:
                held_loss = evaluate(model, held, args.rows)
            point = {"step": step + 1, "epoch": round((step + 1) / max(1, per_epoch), 2), "lr": round(lr, 7)}
            train_loss = float(torch.stack(recent).mean())
            curve.append(point | {"train_loss": round(train_loss, 4), "heldout_loss": round(held_loss, 4)})
            recent.clear()
            if held_loss < best:
                best = held_loss
                best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            elapsed = time.perf_counter() - start
            print(f"step {step + 1}/{steps} train {train_loss:.4f} heldout {held_loss:.4f} {elapsed:.0f} s", flush=True)
    for hook in hooks:
        hook.remove()
    model.load_state_dict(best_weights)
    return curve
