"""Where bottleneck adapters go in a model: found by the structure of its blocks, not by its name.

A block's sub-block (attention, feed-forward) maps its input x to an output h, and the block goes on with x + h, through
a norm in models that normalise afterwards (BERT). An adapter needs three things of it: the module whose output is h,
a module whose input is x, and that norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import nn

from ludwig_peft_plugin.adapters.bottleneck.config import BottleneckConfig

ATTENTION, FEED_FORWARD = "attention", "feed_forward"


@dataclass(frozen=True)
class Place:
    """Modules of a block, by their names in it.

    Attributes:
        output: its output is h. The adapter is put around it.
        residual: its first input is x; an empty name is the block itself.
        norm: the norm through which x + h goes, None where there is none.
    """

    output: str
    residual: str
    norm: str | None = None


@dataclass(frozen=True)
class Layout:
    """One way to build a block.

    Attributes:
        models: whose blocks look like that.
        attention: the place after attention.
        feed_forward: the place after the feed-forward layers.
        absent: modules that such a block does not have.
        values: attributes of the block (dotted names) and their values in such a block.
        adapterhub: what AdapterHub's library calls the two places; None where it puts adapters elsewhere.
    """

    models: str
    attention: Place
    feed_forward: Place
    absent: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    adapterhub: tuple[str, str] | None = None

    def fits(self, block: nn.Module) -> bool:
        """Return whether `block` is built like that."""
        places = (self.attention, self.feed_forward)
        names = [name for place in places for name in (place.output, place.residual, place.norm) if name]
        return (
            all(_has(block, name) for name in names)
            and not any(_has(block, name) for name in self.absent)
            and all(_value(block, name) == value for name, value in self.values.items())
        )


_NORMS = ("input_layernorm", "post_attention_layernorm")
_HUB = ("attention_adapters", "output_adapters")

LAYOUTS = [
    Layout(
        "Phi-3",
        Place("resid_attn_dropout", _NORMS[0]),
        Place("resid_mlp_dropout", _NORMS[1]),
    ),
    Layout(
        "Gemma 2 and 3",
        Place("post_attention_layernorm", "input_layernorm"),
        Place("post_feedforward_layernorm", "pre_feedforward_layernorm"),
    ),
    Layout(
        "OLMo 2",
        Place("post_attention_layernorm", "self_attn"),
        Place("post_feedforward_layernorm", "mlp"),
        absent=("input_layernorm",),
    ),
    Layout(
        "Llama, Mistral, Qwen 2 and 3, Gemma, OLMo, SmolLM, Granite",
        Place("self_attn.o_proj", _NORMS[0]),
        Place("mlp.down_proj", _NORMS[1]),
        adapterhub=_HUB,
    ),
    Layout("StarCoder 2", Place("self_attn.o_proj", _NORMS[0]), Place("mlp.c_proj", _NORMS[1])),
    Layout("Mixtral, Qwen 3 MoE", Place("self_attn.o_proj", _NORMS[0]), Place("mlp", _NORMS[1])),
    Layout(
        "Cohere",
        Place("self_attn.o_proj", "input_layernorm"),
        Place("mlp.down_proj", "input_layernorm"),
        absent=("post_attention_layernorm",),
    ),
    Layout(
        "Phi",
        Place("self_attn.dense", "input_layernorm"),
        Place("mlp.fc2", "input_layernorm"),
        absent=("post_attention_layernorm",),
    ),
    Layout("GPT-NeoX, Pythia", Place("post_attention_dropout", _NORMS[0]), Place("post_mlp_dropout", _NORMS[1])),
    Layout("GPT-2", Place("attn.resid_dropout", "ln_1"), Place("mlp.dropout", "ln_2"), adapterhub=_HUB),
    Layout("GPT-Neo", Place("attn.attention.resid_dropout", "ln_1"), Place("mlp.dropout", "ln_2")),
    Layout("GPT-J", Place("attn.resid_dropout", "ln_1"), Place("mlp.dropout", "ln_1"), absent=("ln_2",)),
    Layout(
        "OPT",
        Place("self_attn.out_proj", "self_attn_layer_norm"),
        Place("fc2", "final_layer_norm"),
        values={"do_layer_norm_before": True},
    ),
    Layout(
        "OPT 350M",
        Place("self_attn.out_proj", "self_attn", "self_attn_layer_norm"),
        Place("fc2", "fc1", "final_layer_norm"),
        values={"do_layer_norm_before": False},
    ),
    Layout(
        "BLOOM",
        Place("self_attention.dense", ""),
        Place("mlp.dense_4h_to_h", "post_attention_layernorm"),
        values={"apply_residual_connection_post_layernorm": False},
    ),
    Layout(
        "Falcon",
        Place("self_attention.dense", ""),
        Place("mlp.dense_4h_to_h", ""),
        absent=("post_attention_layernorm",),
    ),
    Layout("MPT", Place("attn.out_proj", "norm_1"), Place("ffn.down_proj", "norm_2")),
    Layout("ModernBERT", Place("attn.out_drop", "attn_norm"), Place("mlp.Wo", "mlp_norm")),
    Layout(
        "BERT, RoBERTa, ELECTRA, DeBERTa",
        Place("attention.output.dropout", "attention", "attention.output.LayerNorm"),
        Place("output.dropout", "intermediate", "output.LayerNorm"),
        adapterhub=("attention.output", "output"),
    ),
    Layout(
        "DistilBERT",
        Place("attention.out_lin", "attention", "sa_layer_norm"),
        Place("ffn.dropout", "ffn", "output_layer_norm"),
        adapterhub=_HUB,
    ),
]
"""The blocks that are known, the more specific first. Others are added by appending to the list."""


@dataclass(frozen=True)
class Site:
    """A place of an adapter in a model.

    Attributes:
        name: the full name of the module that the adapter is put around.
        block: the full name of its block.
        layer: the block's number, from 0.
        location: `attention` or `feed_forward`.
        residual: the full name of the module whose input is the block's residual.
        norm: the full name of the norm that follows, if any.
        hidden: the size of the hidden states.
        adapterhub: the full name that AdapterHub's library gives the adapter's parent, None where it has none.
    """

    name: str
    block: str
    layer: int
    location: str
    residual: str
    norm: str | None
    hidden: int
    adapterhub: str | None


def find_sites(model: Any, config: BottleneckConfig) -> list[Site]:
    """Return the places in `model` at which `config` asks for an adapter, in order.

    Raises:
        ValueError: the model's blocks are of no known structure, or `leave_out` names layers it does not have, or all.
    """
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    path, layouts = _blocks(model, text.num_hidden_layers)
    unknown = sorted(set(config.leave_out) - set(range(len(layouts))))
    if unknown:
        raise ValueError(
            f"leave_out: layer {unknown[0]} does not exist, the model's layers are 0 to {len(layouts) - 1}."
        )
    sites = []
    for layer, layout in enumerate(layouts):
        if layer in config.leave_out:
            continue
        hub = layout.adapterhub or (None, None)
        wanted = (
            (config.mh_adapter, ATTENTION, layout.attention),
            (config.output_adapter, FEED_FORWARD, layout.feed_forward),
        )
        for (asked, location, place), hub_name in zip(wanted, hub, strict=True):
            if asked:
                block = f"{path}.{layer}"
                sites.append(
                    Site(
                        name=f"{block}.{place.output}",
                        block=block,
                        layer=layer,
                        location=location,
                        residual=f"{block}.{place.residual}".rstrip("."),
                        norm=f"{block}.{place.norm}" if place.norm else None,
                        hidden=text.hidden_size,
                        adapterhub=f"{block}.{hub_name}" if hub_name else None,
                    )
                )
    if not sites:
        raise ValueError(f"leave_out: names all {len(layouts)} layers, so there is no adapter; keep one.")
    return sites


def _blocks(model: nn.Module, count: int) -> tuple[str, list[Layout]]:
    """Return the name of the model's list of blocks and each one's layout."""
    found, seen = [], set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            layouts = [layout for block in module if (layout := _layout(block)) is not None]
            if len(layouts) == count:
                found.append((name, layouts))
            seen.add(type(module[0]).__name__)
    if len(found) == 1:
        return found[0]
    known = ", ".join(layout.models for layout in LAYOUTS)
    if found:
        names = " and ".join(name for name, _ in found)
        raise ValueError(
            f"{type(model).__name__} has several stacks of blocks ({names}); adapters can be put in one only."
        )
    blocks = f" ({', '.join(sorted(seen))})" if seen else ""
    raise ValueError(
        f"the places for adapters in {type(model).__name__}{blocks} are not known. Blocks built like those of these "
        f"models are: {known}. Describe others with a Layout in ludwig_peft_plugin.adapters.bottleneck.places.LAYOUTS."
    )


def _layout(block: nn.Module) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.fits(block)), None)


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def _value(block: nn.Module, name: str) -> Any:
    try:
        return attrgetter(name)(block)
    except AttributeError:
        return None
