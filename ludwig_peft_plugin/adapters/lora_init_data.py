"""Initialisations of LoRA from training batches: EVA, CorDA and LoRA-GA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ludwig_peft_plugin.adapters.base import ADAPTER_NAME
from ludwig_peft_plugin.adapters.lora_init_weights import decompose
from ludwig_peft_plugin.adapters.peft_build import lora_layers
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from ludwig_peft_plugin.adapters.base import Batches

EVA_MAX_FORWARDS = 1000
EVA_PROBE_TOKENS = 16


def eva(model: PeftModel, layers: dict[str, Any], method: str, batches: Batches | None) -> None:
    """EVA: A are the principal components of a layer's inputs on training rows, and ranks follow the variance.

    Paischer et al. 2024 (https://arxiv.org/abs/2410.07170). Layers that are left with rank 0 lose their adapter.

    Raises:
        AdapterError: the batches have too few tokens for the rank, or the components do not converge.
    """
    from peft import initialize_lora_eva_weights

    assert batches is not None
    config: Any = model.peft_config[ADAPTER_NAME]
    wanted = max(round(rank * config.eva_config.rho) for rank in (config.r, *config.rank_pattern.values()))
    loader = _EvaBatches(batches, config.eva_config, wanted)
    forwards = 0

    def forward(peft_model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > EVA_MAX_FORWARDS:
            raise AdapterError(
                f"adapter.init_lora_weights: eva has not converged after {EVA_MAX_FORWARDS} batches with "
                f"eva_config.tau: {config.eva_config.tau}; lower tau, or rho or r."
            )
        peft_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    initialize_lora_eva_weights(model, dataloader=loader, forward_fn=forward, show_progress_bar=False)
    config.init_lora_weights, config.eva_config = True, None
    left = lora_layers(model)
    if len(left) < len(layers):
        # PEFT shortens the names of what is left, which can make them match a layer that lost its adapter.
        config.target_modules = {name.removeprefix("base_model.model.") for name in left}


class _EvaBatches:
    """Training batches as PEFT's EVA wants them: with a length, and a small first pass.

    The first pass is the one in which PEFT compares the layers' inputs through Python lists, which takes minutes on a
    batch of a large model; a few tokens tell equal inputs from different ones just as well.
    """

    def __init__(self, batches: Batches, eva_config: Any, wanted: int) -> None:
        self._batches, self._config, self._wanted = batches, eva_config, wanted
        self._probed = False

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if not self._probed:
            self._probed = True
            yield self._probe()
            return
        yield from self._batches()

    def _probe(self) -> dict[str, torch.Tensor]:
        """Return a few counted tokens of the largest batch, after checking that it has enough of them."""
        best, count = {}, 0
        for batch in self._batches():
            counted = int(self._counted(batch).sum())
            if counted > count:
                best, count = batch, counted
            if count >= self._wanted:
                break
        if count < self._wanted:
            raise AdapterError(
                f"adapter.init_lora_weights: eva needs {self._wanted} tokens in a batch (r times eva_config.rho), and "
                f"the largest has {count} that count; raise trainer.batch_size, lower r or eva_config.rho, or set "
                "eva_config.use_label_mask: false."
            )
        row, first = self._counted(best).nonzero()[0].tolist()
        return {name: tensor[row : row + 1, first : first + EVA_PROBE_TOKENS] for name, tensor in best.items()}

    def _counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return which tokens EVA counts, shape [rows, length]."""
        counted = batch["attention_mask"].bool()
        if self._config.use_label_mask:
            counted = counted & (batch["labels"] != self._config.label_mask_value)
        return counted


def prepare_corda(base: PreTrainedModel, config: LoraConfig, batches: Batches) -> None:
    """Decompose the target weights by the covariance of their inputs, before PEFT changes the base."""
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for batch in batches():
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                # PEFT's covariance takes one row at a time, and would count padding.
                base(input_ids=ids[mask.bool()][None], use_cache=False)

    training = base.training
    preprocess_corda(base, config, run_model=run)
    base.train(training)


def corda(model: PeftModel, layers: dict[str, Any], method: str, batches: Batches | None) -> None:
    """CorDA: A and B are components of W chosen by its inputs' covariance (Yang et al. 2024, arXiv 2406.05223)."""
    decompose(model, layers, method, lambda layer: layer.corda_init(ADAPTER_NAME, "corda"))


def prepare_lora_ga(base: PreTrainedModel, config: LoraConfig, batches: Batches) -> None:
    """Estimate the gradient of the target weights on the batches, before PEFT changes the base.

    Raises:
        AdapterError: no gradient reaches a target weight.
    """
    from peft.tuners.lora.loraga import get_target_modules, preprocess_loraga

    def step() -> None:
        for batch in batches():
            base(**batch, use_cache=False).loss.backward()

    with warnings.catch_warnings():
        # The first layer's inputs need no gradient, because the embeddings are frozen; only weights are asked for.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(base, config, step)
    for name, module in get_target_modules(base, config):
        if not hasattr(module, "_peft_loraga_grad"):
            raise AdapterError(
                f"adapter.init_lora_weights: lora_ga found no gradient for {name!r} in the training batches; leave it "
                "out of target_modules, or use another initialisation (pissa, eva)."
            )


def lora_ga(model: PeftModel, layers: dict[str, Any], method: str, batches: Batches | None) -> None:
    """LoRA-GA: A and B are singular vectors of the gradient of W (Wang et al. 2024, arXiv 2407.05000)."""
    config: Any = model.peft_config[ADAPTER_NAME]
    settings = config.lora_ga_config
    decompose(model, layers, method, lambda layer: layer.lora_ga_init(ADAPTER_NAME, settings))
