"""The model of `model_type: llm`: Ludwig's LLM with its loading, step, saving and generation replaced."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ludwig.constants import COMBINED, LOSS, TEXT
from ludwig.globals import MODEL_WEIGHTS_FILE_NAME
from ludwig.models.base import BaseModel
from ludwig.models.llm import LLM
from ludwig.utils.torch_utils import get_torch_device

from ludwig_peft_plugin.adapters.several.active import chosen_adapter
from ludwig_peft_plugin.adapters.several.mixed import using
from ludwig_peft_plugin.data.batches import MicroBatch
from ludwig_peft_plugin.data.lengths import context_for_rows
from ludwig_peft_plugin.errors import AdapterError
from ludwig_peft_plugin.evaluation.metrics import TokenMetrics
from ludwig_peft_plugin.model import base_model
from ludwig_peft_plugin.model.features import TextInput, TextOutput
from ludwig_peft_plugin.model.float8 import keep_transposed_copies
from ludwig_peft_plugin.model.generation import generation_settings
from ludwig_peft_plugin.model.storage import load_weights, save_weights
from ludwig_peft_plugin.training.loss import TargetLoss, target_loss
from ludwig_peft_plugin.training.out_of_memory import explained_out_of_memory

logger = logging.getLogger(__name__)

Batches = Callable[[], Iterable[dict[str, torch.Tensor]]]


def create_llm(config_obj: Any, random_seed: int | None = None, **arguments: Any) -> LLM:
    """Return the plugin's model for text answers, and Ludwig's own for the rest (categories, images, DPO)."""
    from ludwig_peft_plugin.data.preprocess import is_text_to_text

    if is_text_to_text(config_obj):
        return PeftLLM(config_obj, random_seed=random_seed, **arguments)
    if config_obj.quantization and config_obj.quantization.bnb_4bit_compute_dtype == "auto":
        config_obj.quantization.bnb_4bit_compute_dtype = "float16"  # Ludwig's default, which its own model reads
    return LLM(config_obj, random_seed=random_seed, **arguments)


class PeftLLM(LLM):
    """A causal language model, its tokenizer and its adapter.

    Attributes:
        model: the transformers model, wrapped by PEFT once the adapter is attached.
        tokenizer: the base model's tokenizer, with a pad token and left padding.
        metrics: what the training steps since the last evaluation added up to.
    """

    def __init__(self, config_obj: Any, random_seed: int | None = None, _device: Any = None, **_arguments: Any) -> None:
        # LLM.__init__ loads in float32 and builds encoders and decoders that are not needed: only its base is run.
        BaseModel.__init__(self, random_seed=random_seed)
        self.config_obj = config_obj
        self._random_seed = random_seed
        self._adapter_initialized = False
        self.model_name = config_obj.base_model
        self.model_config = base_model.load_model_config(config_obj)
        self.tokenizer = base_model.load_tokenizer(config_obj.base_model, config_obj.trust_remote_code)
        self.curr_device = torch.device(_device or get_torch_device())
        with explained_out_of_memory(config_obj, "loading the base model"):
            self.model = base_model.load_base_model(config_obj, self.model_config, self.curr_device)
        self.context_len = context_for_rows(config_obj, base_model.context_length(self.model_config))
        limit = config_obj.preprocessing.global_max_sequence_length
        self.global_max_sequence_length = min(limit, self.context_len) if limit else self.context_len
        self.metrics = TokenMetrics()
        self._set_generation_config(config_obj.generation.to_dict())
        self.output_feature_type = TEXT
        self.input_features = {feature.name: TextInput(feature) for feature in config_obj.input_features}
        self.output_features = {
            feature.name: TextOutput(feature, self.tokenizer) for feature in config_obj.output_features
        }

    # ---- generation -------------------------------------------------------------------------------------------

    def _set_generation_config(self, new_generation_config_dict: dict[str, Any]) -> None:
        """Set what `generate` uses. Ludwig calls this to change it for one prediction and to put it back."""
        self.generation = generation_settings(new_generation_config_dict, self.tokenizer, self.model)
        self.max_new_tokens = self.generation.max_new_tokens
        self.max_input_length = max(1, self.context_len - (self.max_new_tokens or 0))

    @contextmanager
    def use_generation_config(self, generation_config_dict: dict[str, Any] | None = None) -> Iterator[None]:
        """Change the generation settings for one prediction; `adapter` among them names the adapter that answers."""
        settings = dict(generation_config_dict or {})
        adapter = settings.pop("adapter", chosen_adapter())
        with super().use_generation_config(settings or None), using(self, adapter):
            yield

    # ---- training ---------------------------------------------------------------------------------------------

    @property
    def awaits_data(self) -> bool:
        """Whether the adapter still has to be attached because its initialisation reads training rows."""
        chosen = self.config_obj.adapter or self.config_obj.adapters
        return not self._adapter_initialized and bool(getattr(chosen, "needs_data", False))

    def initialize_adapter(self, batches: Batches | None = None) -> None:
        """Attach the configured adapter (or adapters) once.

        Args:
            batches: yields a few training batches, for the initialisations that read data.

        Raises:
            AdapterError: the adapter cannot be attached as asked.
        """
        if self._adapter_initialized:
            return
        adapter = self.config_obj.adapter
        if adapter:
            if self.config_obj.trainer.type == "none" and not adapter.pretrained_adapter_weights:
                raise AdapterError(
                    "adapter: with trainer.type: none an adapter needs pretrained_adapter_weights, because nothing is "
                    "trained; set trainer.type: finetune to train one."
                )
            from ludwig_peft_plugin.adapters.build import attach_adapter

            if adapter.postprocessor.merge_adapter_into_base_model or self._exports_merged():
                obstacle = getattr(adapter, "merge_obstacle", lambda base: None)(self.model)
                if obstacle:
                    raise AdapterError(f"{obstacle} Export the adapter instead of the merged model.")
            self.model = attach_adapter(self.model, adapter, batches=batches)
        elif self.config_obj.adapters is not None:
            from ludwig_peft_plugin.adapters.several.attach import attach_adapters

            self.model = attach_adapters(self.model, self.config_obj.adapters, batches=batches)
        else:
            return
        self._adapter_initialized = True
        trainable, total = self.parameter_counts()
        logger.info(
            "Adapter %s: %s of %s parameters are trained (%.2f%%)",
            adapter.type if adapter else ", ".join(self.config_obj.adapters.adapters),
            f"{trainable:,}",
            f"{total:,}",
            100 * trainable / total,
        )

    def _exports_merged(self) -> bool:
        return any(entry.format == "merged" for entry in self.config_obj.export)

    def prepare_for_training(self) -> None:
        """Attach the adapter, or free the base's weights where there is none. Called by Ludwig's trainer."""
        if base_model.trains_base(self.config_obj):
            if self.config_obj.quantization:
                raise AdapterError(
                    "quantization: a quantised base cannot be trained itself. Add an adapter (adapter: {type: qlora}) "
                    "or remove the quantization section."
                )
            if self.config_obj.adapter:
                self.initialize_adapter()
            else:
                self.model.requires_grad_(True)
        elif not self.awaits_data:
            self.initialize_adapter()
        if self.config_obj.quantization and self.config_obj.quantization.mode == "float8":
            keep_transposed_copies(self.model, self.config_obj.quantization.float8_transposed_copy)

    @property
    def trains_its_embedding(self) -> bool:
        """Whether the input embedding is trained."""
        return any(parameter.requires_grad for parameter in self.model.get_input_embeddings().parameters())

    def parameter_counts(self) -> tuple[int, int]:
        """Return (trained, all) parameters; a 4-bit weight counts as the numbers it stands for."""
        trainable = total = 0
        for parameter in self.model.parameters():
            count = parameter.numel()
            shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
            if shape is not None:
                count = int(torch.Size(shape).numel())
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def forward(self, inputs: MicroBatch, mask: Any = None) -> TargetLoss:
        """Return the loss sums of one micro-batch on the model's device."""
        return target_loss(self.model, inputs)

    def to_device(self, device: Any) -> PeftLLM:
        """Stay where the weights were loaded: they are already on the device, quantised ones for good."""
        return self

    # ---- metrics ----------------------------------------------------------------------------------------------

    def metrics_to_device(self, device: str) -> None:
        """Do nothing: sums are made on the device of the logits."""

    def get_metrics(self) -> dict[str, dict[str, float]]:
        """Return what the training steps since the last reset added up to."""
        values = self.metrics.compute(getattr(self.config_obj.trainer, "validation_metric", None))
        return self.named_metrics(values)

    def named_metrics(self, values: dict[str, float]) -> dict[str, dict[str, float]]:
        """Return metric values in Ludwig's form: by output feature, and the combined loss."""
        return {**{name: dict(values) for name in self.output_features}, COMBINED: {LOSS: values.get(LOSS, 0.0)}}

    def reset_metrics(self) -> None:
        """Forget the training steps seen."""
        self.metrics.reset()

    # ---- saving and loading -----------------------------------------------------------------------------------

    def save(self, save_path: str) -> None:
        """Save the adapter (never the base) or, after full fine-tuning, the model, below `save_path`."""
        if self.config_obj.trainer.type == "none":
            logger.info("Nothing was trained, so no weights are saved.")
            return
        save_weights(self, os.path.join(save_path, MODEL_WEIGHTS_FILE_NAME))

    def save_base_model(self, save_path: str) -> None:
        """Save the merged model with its tokenizer; Ludwig calls this after `merge_and_unload`."""
        folder = os.path.join(save_path, MODEL_WEIGHTS_FILE_NAME)
        save_weights(self, folder)
        self.tokenizer.save_pretrained(folder)

    def load(self, save_path: str) -> None:
        """Load what `save` or stock Ludwig 0.17 wrote below `save_path`."""
        if self.config_obj.trainer.type == "none":
            logger.info("Nothing was trained, so there are no weights to load.")
            self.initialize_adapter()  # one that was trained before has its own folder
            return
        load_weights(self, os.path.join(save_path, MODEL_WEIGHTS_FILE_NAME))

    def merge_and_unload(self, progressbar: bool = False) -> None:
        """Merge the adapter into the base, which is dequantised first, and keep the plain model.

        A 4-bit grid is far coarser than an adapter's change, so merging into quantised weights would lose it.
        """
        from ludwig_peft_plugin.export.merged import merged_model

        self.model = merged_model(self).to(self.curr_device)
        self._adapter_initialized = True
