"""Build the encoder of a feature with its adapter, in place of Ludwig's `InputFeature.initialize_encoder`."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from ludwig.encoders.registry import get_encoder_cls
from ludwig.encoders.text_encoders import HFTextEncoder, LLMEncoder
from ludwig.schema.llms.peft import BaseAdapterConfig
from ludwig.utils.torch_utils import FreezeModule

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.config.adapter_types import AdapterSelection
from ludwig_peft_plugin.encoders.pretrained import load_pretrained
from ludwig_peft_plugin.encoders.saved import RebuildWhenLoaded
from ludwig_peft_plugin.encoders.targets import with_default_targets
from ludwig_peft_plugin.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

POOLED = "cls_pooled"


def initialize_encoder(original: Callable[..., Any], feature: Any, encoder_config: Any) -> Any:
    """Return the encoder of `feature`, with the adapter of its config.

    Args:
        original: Ludwig's function, which builds encoders without an adapter.
        feature: the input feature.
        encoder_config: its encoder section.

    Raises:
        AdapterError: the adapter cannot be applied to this encoder; stock Ludwig warns and trains all its weights.
    """
    if not getattr(encoder_config, "adapter", None):
        return original(feature, encoder_config)
    where = f"input feature {feature.feature_name!r}, encoder {encoder_config.type!r}"
    encoder_class = get_encoder_cls(feature.type(), encoder_config.type)
    if issubclass(encoder_class, LLMEncoder):
        return original(feature, encoder_config)  # its adapter is put on when training begins
    if not issubclass(encoder_class, HFTextEncoder):
        encoder = original(feature, encoder_config)
        if not _has_adapter(encoder):
            raise AdapterError(
                f"{where}: the adapter could not be applied to this encoder (see the log for the reason). Remove the "
                "adapter, or use a text encoder such as bert."
            )
        return encoder
    adapter: Any = AdapterSelection().resolve(encoder_config.adapter)
    encoder = original(feature, encoder_config.model_copy(update={"adapter": None}))
    encoder.config.adapter = adapter
    pooled = getattr(encoder_config, "reduce_output", None) == POOLED
    attach = functools.partial(attach_to_encoder, adapter=adapter, pooled=pooled)
    try:
        model = attach(encoder.transformer.module)
        if adapter.pretrained_adapter_weights and not weights_follow(encoder_config):
            load_pretrained(model, adapter)
    except AdapterError as error:
        raise AdapterError(f"{where}: {error}") from error
    # Ludwig's wrapper keeps a frozen module in evaluation mode, where dropout does nothing.
    encoder.transformer = FreezeModule(model, frozen=not encoder_config.trainable)
    if weights_follow(encoder_config):
        RebuildWhenLoaded(attach).install(encoder.transformer)
    _report(where, str(adapter.type), model)
    return encoder


def attach_to_encoder(transformer: PreTrainedModel, adapter: BaseAdapterConfig, *, pooled: bool) -> PeftModel:
    """Return a text encoder's transformer with a new adapter; only the adapter's parameters are trainable.

    Weights of 16 bits become float32, which is what the other parts of Ludwig's model compute in.

    Args:
        transformer: a model that returns hidden states.
        adapter: the adapter section.
        pooled: whether the encoder's output is that of the pooler; otherwise the pooler is not used, and gets nothing.

    Raises:
        AdapterError: an option cannot take effect.
    """
    if transformer.dtype in (torch.float16, torch.bfloat16):
        transformer.float()
    adapter = with_default_targets(transformer, adapter)
    with _without_unused_pooler(transformer, pooled):
        return attach_adapter(transformer, adapter.model_copy(update={"pretrained_adapter_weights": None}))


def weights_follow(encoder_config: Any) -> bool:
    """Return whether a saved model is being loaded, whose weights Ludwig loads once the encoder is built."""
    return bool(getattr(encoder_config, "saved_weights_in_checkpoint", False))


@contextlib.contextmanager
def _without_unused_pooler(transformer: PreTrainedModel, pooled: bool) -> Iterator[None]:
    """Take the pooler out while an adapter is put on, if nothing reads its output: it would get no gradient."""
    pooler = getattr(transformer, "pooler", None)
    if pooled or not isinstance(pooler, torch.nn.Module):
        yield
        return
    transformer.pooler = None
    try:
        yield
    finally:
        transformer.pooler = pooler.requires_grad_(False)


def embedding_layer(encoder: Any) -> torch.nn.Module:
    """Return the embeddings of a text encoder, which explanations attribute to: the transformer's first child."""
    from peft import PeftModel

    transformer = encoder.transformer.module
    if isinstance(transformer, PeftModel):
        transformer = transformer.get_base_model()
    child: torch.nn.Module = next(transformer.children())
    return child


def _has_adapter(encoder: torch.nn.Module) -> bool:
    from peft import PeftModel

    return any(isinstance(module, PeftModel) for module in encoder.modules())


def _report(where: str, kind: str, model: PeftModel) -> None:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    logger.info(
        "%s: adapter %s trains %d of %d parameters (%.2f%%).", where, kind, trained, total, 100 * trained / total
    )
