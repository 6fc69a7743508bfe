"""The model of a config on the meta device: the real classes and shapes, and no data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from ludwig_peft_plugin.adapters.base import AdapterConfig
from ludwig_peft_plugin.engine.checkpoint import install
from ludwig_peft_plugin.engine.embeddings import offload_embedding
from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.engine.offload import HostStore
from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.estimate.gpu_view import gpu_view
from ludwig_peft_plugin.estimate.host import HostMemory
from ludwig_peft_plugin.estimate.named_adapters import moved_to_layers
from ludwig_peft_plugin.estimate.no_data import NoData
from ludwig_peft_plugin.estimate.quantise import copyable_weights, quantise_on_meta
from ludwig_peft_plugin.estimate.storage import model_tensors, own_tensors, storages
from ludwig_peft_plugin.estimate.tracker import MemoryTracker
from ludwig_peft_plugin.model.base_model import PRECISIONS, load_model_config, trains_base
from ludwig_peft_plugin.model.checkpoint_quantization import loading_arguments
from ludwig_peft_plugin.model.llm import PeftLLM

META = torch.device("meta")


class MetaLLM(PeftLLM):
    """A `PeftLLM` without data, built from the base's config.json, ready to train.

    Attributes:
        tracker: counts the memory of steps.
        host: host memory, for what is offloaded.

    Raises:
        ModelError: there is no such base, or the config trains nothing.
        AdapterError: the adapter cannot be attached as asked.
    """

    def __init__(self, config_obj: Any) -> None:
        nn.Module.__init__(self)
        self._forward_hook_handles: list[Any] = []
        self._adapter_initialized = False
        self.config_obj = with_plain_start(config_obj)
        self.model_config = load_model_config(config_obj)
        self.curr_device = META
        self.tracker = MemoryTracker()
        self.host = HostMemory(self.tracker)
        self.model = build_base(config_obj, self.model_config)
        of_base = set(map(id, self.model.modules()))
        with warnings.catch_warnings(), copyable_weights(), gpu_view(), NoData(), moved_to_layers(), self.stand_ins():
            # A trained adapter's weights are read, and left where there is no data.
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter", UserWarning)
            self.prepare_for_training()
        _drop_data(self.model)
        self.model.train()
        _freeze_as_asked(config_obj, self)
        self._save_memory(config_obj.trainer)
        on_host = storages(self.host.buffers)
        base = storages(own_tensors(module for module in self.model.modules() if id(module) in of_base))
        self.base_storages = {key: size for key, size in base.items() if key not in on_host}

    @contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Within the context, the adapters' layers are made and run without data."""
        with ExitStack() as stack:
            for kind in dict.fromkeys(map(type, adapters_of(self.config_obj))):
                if issubclass(kind, AdapterConfig):
                    stack.enter_context(kind.without_data())
            yield

    def _save_memory(self, trainer: Any) -> None:
        """Do what the trainer does to save memory."""
        base = unwrapped(self.model)
        if trainer.enable_gradient_checkpointing:
            install(base, trainer.checkpoint_layers, HostStore(self.host) if trainer.checkpoint_offload else None)
        if trainer.embedding_offload:
            offload_embedding(self.model, to_host=self.host.hold)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def adapter_tensors(self) -> list[Tensor]:
        """Return what attaching the adapter has added to the base, trained or not."""
        others = self.base_storages.keys() | storages(self.host.buffers).keys()
        return [tensor for tensor in model_tensors(self.model) if not storages([tensor]).keys() <= others]


def build_base(config_obj: Any, model_config: Any) -> Any:
    """Return the base as `load_base_model` would put it on a GPU, on the meta device."""
    dtype = gpu_precision(config_obj)
    arguments = loading_arguments(config_obj, model_config, dtype)
    # Of a checkpoint that is quantised already, the config says how.
    settings = arguments.get("quantization_config") or getattr(arguments["config"], "quantization_config", None)
    with META, no_init_weights():
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(arguments["config"]), dtype=dtype, trust_remote_code=bool(config_obj.trust_remote_code)
        )
    model.tie_weights()
    if settings is not None:
        quantise_on_meta(model, settings, dtype)
    return model.requires_grad_(False)


def gpu_precision(config_obj: Any) -> torch.dtype:
    """Return the dtype of the base's weights on a GPU that computes in bfloat16."""
    precision = getattr(config_obj, "precision", "auto")
    if precision != "auto":
        return PRECISIONS[precision]
    return torch.float32 if trains_base(config_obj) else torch.bfloat16


def with_plain_start(config_obj: Any) -> Any:
    """Return the config with adapters of the same size whose start needs neither data nor weights."""
    config_obj = copy.deepcopy(config_obj)
    section = getattr(config_obj, "adapters", None)
    if section is not None:
        section.adapters = section.objects()
    for adapter in adapters_of(config_obj):
        if isinstance(adapter, AdapterConfig):
            adapter.start_plainly()
    return config_obj


def adapters_of(config_obj: Any) -> list[Any]:
    """Return the adapters of a config: the one, several, or none."""
    section = getattr(config_obj, "adapters", None)
    named = () if section is None else section.objects().values()
    return [adapter for adapter in (config_obj.adapter, *named) if adapter]


def _drop_data(model: nn.Module) -> None:
    """Put what an adapter has made on the host on the meta device; parameters that are shared stay so."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None and tensor.device != META:
                    if id(tensor) not in moved:
                        empty = tensor.detach().to(META)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    owned[name] = moved[id(tensor)]  # type: ignore[assignment]


def _freeze_as_asked(config_obj: Any, llm: MetaLLM) -> None:
    if getattr(config_obj.trainer, "layers_to_freeze_regex", None):
        from ludwig.utils.trainer_utils import freeze_layers_regex

        freeze_layers_regex(config_obj.trainer, llm)
    if not llm.trained:
        raise ModelError(
            "Nothing would be trained: add an adapter, or remove trainer.layers_to_freeze_regex if it froze everything."
        )
