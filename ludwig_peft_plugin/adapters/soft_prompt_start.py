"""How virtual tokens start: as tokens of the vocabulary, of a text or of the training rows.

Virtual tokens drawn at random lie far from where a model expects its inputs, and are learned slowly or not at all. As
embeddings, or keys and values, of real tokens they start where the model works (Lester et al. 2021,
https://arxiv.org/abs/2104.08691, section 3.2; Li & Liang 2021, https://arxiv.org/abs/2101.00190, section 7.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME, Batches
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ludwig_peft_plugin.adapters.soft_prompts import SoftPrompt

TEXT_INIT = "adapter.init: text"


def check_room(base: PreTrainedModel, count: int) -> None:
    """Refuse virtual tokens that leave a row no place in the model's context.

    Raises:
        AdapterError: there are `count` of them.
    """
    from ludwig_peft_plugin.model.base_model import context_length

    context = context_length(base.config)
    if count > context - 2:  # a row is a token of the prompt and one of the answer at least
        raise AdapterError(
            f"adapter.num_virtual_tokens: {count} leaves no room for a row in the model's context of {context} tokens; "
            f"use at most {context - 2}."
        )


def start_tokens(adapter: SoftPrompt, base: PreTrainedModel, batches: Batches | None) -> Tensor | None:
    """Return the ids of the tokens that an adapter's virtual tokens start as, shape (P,); None for a random start.

    Raises:
        AdapterError: the text or the rows have no tokens, or there is no tokenizer for the text.
    """
    count = adapter.context_tokens
    sources = {"sample_vocab": lambda: sampled(base, count), "text": lambda: _of_text(adapter, base)}
    sources["data"] = lambda: _of_rows(batches, count)
    make = sources.get(adapter.start)
    if make is None:
        return None
    tokens = make()
    if not len(tokens):
        raise AdapterError(f"adapter.init: {adapter.start} gives no token to start from; use sample_vocab.")
    repeats = -(-count // len(tokens))
    return tokens.repeat(repeats)[:count].to(base.get_input_embeddings().weight.device)


def sampled(base: PreTrainedModel, count: int) -> Tensor:
    """Return `count` random tokens of the vocabulary, behind the one that begins a text if the base has one."""
    vocabulary = base.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (count,))
    begin = getattr(base.config.get_text_config(), "bos_token_id", None)
    if isinstance(begin, int) and begin < vocabulary:
        tokens[0] = begin
    return tokens


def _of_text(adapter: Any, base: PreTrainedModel) -> Tensor:
    from ludwig_peft_plugin.errors import ModelError
    from ludwig_peft_plugin.model.base_model import load_tokenizer

    name = str(base.name_or_path or "")
    try:
        tokenizer = load_tokenizer(name, False) if name else None
    except ModelError as error:
        raise AdapterError(f"{TEXT_INIT} needs the base model's tokenizer: {error}") from error
    if tokenizer is None:
        raise AdapterError(f"{TEXT_INIT} needs a base model that was loaded by name, whose tokenizer can be found.")
    return torch.tensor(tokenizer(adapter.init_text)["input_ids"], dtype=torch.int64)


def _of_rows(batches: Batches | None, count: int) -> Tensor:
    """Return the first tokens of the first rows, one after another, without padding."""
    if batches is None:
        raise AdapterError(
            "adapter.init: data reads training rows, and there are none here; use init: sample_vocab or text."
        )
    found: list[Tensor] = []
    for batch in batches():
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found.append(row[mask.bool()])
            if sum(map(len, found)) >= count:
                return torch.cat(found).cpu()
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.int64)


def encoder_of(model: Any) -> Any:
    """Return the prompt encoder of a model that PEFT has just wrapped."""
    return model.prompt_encoder[ADAPTER_NAME]


@torch.no_grad()
def embeddings_of(base: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the base's embeddings of tokens, shape (P, H), float32."""
    return base.get_input_embeddings()(tokens).float()


@torch.no_grad()
def keys_and_values_of(base: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return what each layer's attention keeps of tokens, as PEFT lays it out: (P, layers 2 kv_heads d), float32."""
    training = base.training
    base.eval()
    try:
        cache = base(input_ids=tokens[None], use_cache=True).past_key_values
    finally:
        base.train(training)
    parts = [part[0].transpose(0, 1).flatten(1) for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.cat(parts, dim=1).float()


@torch.no_grad()
def fit_last_layer(encoder: nn.Module, wanted: Tensor) -> None:
    """Set the last linear layer of a prompt encoder so that it gives `wanted`, by least squares.

    With z_p the layer's input for virtual token p, W is the smallest with `W z_p + b = wanted_p`, which exists where
    the layer is at least P wide.

    Args:
        encoder: gives (1, P, d) from the ids of the virtual tokens, (1, P).
        wanted: shape (P, d).
    """
    last = [module for module in encoder.modules() if isinstance(module, nn.Linear)][-1]
    inputs: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    training = encoder.training
    encoder.eval()
    try:
        encoder(torch.arange(len(wanted), device=wanted.device)[None])
    finally:
        handle.remove()
        encoder.train(training)
    seen, centre = inputs[0][0].double().cpu(), wanted.double().cpu().mean(dim=0)
    solved = torch.linalg.lstsq(seen, wanted.double().cpu() - centre, driver="gelsd").solution  # (width, d)
    last.weight.copy_(solved.T)
    last.bias.copy_(centre)
