"""How a trainer's adapter starts: at once, from training rows, or from where an interrupted run started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ludwig.trainers.trainer import Trainer

from ludwig_peft_plugin.data.batches import padded
from ludwig_peft_plugin.engine.checkpoint import enable_checkpointing
from ludwig_peft_plugin.engine.compile import compile_layers
from ludwig_peft_plugin.engine.embeddings import offload_embedding
from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.training.checkpoint import trained_parameters
from ludwig_peft_plugin.training.optimizers import parameters_on

CALIBRATION_ROWS = 256  # rows that data-driven initialisations (EVA, CorDA) look at
REPEATABLE = ("default", "gaussian")  # initialisations whose start a checkpoint holds by itself


class AdapterStart(Trainer):
    """The part of the trainer that attaches the adapter and makes the optimiser for it."""

    model: Any
    resume: bool
    _compile: bool
    _embedding_offloaded = False

    def prepare(self) -> None:
        """Create the optimiser, once there is something to optimise.

        Raises:
            ModelError: there is nothing to optimise, or layers cannot be checkpointed as asked.
        """
        if self.model.awaits_data:
            return
        if self.config.embedding_offload and not self._embedding_offloaded:
            offload_embedding(self.model.model)  # before the optimiser, whose list of parameters would keep the weight
            self._embedding_offloaded = True
        checkpointing = self.config.enable_gradient_checkpointing
        self.config.enable_gradient_checkpointing = False  # Ludwig would choose PyTorch's, which costs more time
        try:
            with parameters_on(self.device):
                super().prepare()
        finally:
            self.config.enable_gradient_checkpointing = checkpointing
        if not trained_parameters(self.model):
            raise ModelError(
                "Nothing would be trained: no parameter has a gradient. Add an adapter, or remove "
                "trainer.layers_to_freeze_regex if it froze everything."
            )
        if checkpointing:
            layers, offload = self.config.checkpoint_layers, self.config.checkpoint_offload
            enable_checkpointing(self.model.model, layers=layers, offload=offload)
        if self._compile:
            compile_layers(self.model.model)

    def _attach_adapter_from_data(self, training_set: Any) -> None:
        """Attach an adapter whose initialisation reads training rows (EVA, CorDA)."""
        if not self.model.awaits_data:
            return
        rows = np.random.default_rng((self.random_seed, 0)).permutation(len(training_set))[:CALIBRATION_ROWS]
        size = max(1, self.batch_size) if isinstance(self.batch_size, int) else 1  # `auto` is not known yet

        def batches() -> Iterator[dict[str, torch.Tensor]]:
            for start in range(0, len(rows), size):
                batch = padded(training_set, rows[start : start + size], self._pad_id)
                yield {name: tensor.to(self.device) for name, tensor in batch.items()}

        self.model.initialize_adapter(batches)
        self.prepare()

    @property
    def _initialisation_must_be_kept(self) -> bool:
        """Whether attaching the adapter again may not repeat its start: it reads data or the base's weights."""
        config = self.model.config_obj
        # What several adapters were made of need not be there any more, or be the same.
        return config.adapters is not None or getattr(config.adapter, "init_lora_weights", "default") not in REPEATABLE

    def _keep_initial_adapter(self, folder: str) -> None:
        """Save the adapter as it starts, from which a resumed run restores the same base and shapes."""
        if self._initialisation_must_be_kept and not self.skip_save_progress and not self.resume:
            from ludwig_peft_plugin.model.storage import save_weights

            os.makedirs(os.path.dirname(folder), exist_ok=True)
            save_weights(self.model, folder)

    def _start_from_initial_adapter(self, folder: str) -> None:
        """On resume, put the saved start in the place of the adapter that was attached anew."""
        if not (self.resume and self._initialisation_must_be_kept and os.path.isdir(folder)):
            return
        from ludwig_peft_plugin.model.storage import load_weights

        self.compiled_model._deactivate_forward_hooks()
        load_weights(self.model, folder)
        self.prepare()

    @property
    def _pad_id(self) -> int:
        return int(self.model.tokenizer.pad_token_id)
