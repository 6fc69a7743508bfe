"""`ludwig-peft methods`: every registered adapter type with what its class says about it, and how much it trains."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

SMALL = 200_000_000
"""Parameters of a base up to which a method that cannot be built without numbers is built with random ones."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        type: the name in `adapter.type`.
        aliases: its other names.
        family: which kind of method it is.
        paper: who published it where.
        trained: parameters that are trained on the base, None where that could not be counted.
        share: the same, of all parameters.
        quantized: on which quantised bases it trains: of `bitsandbytes` (4 and 8 bits) and `torchao`.
        mergeable: can become part of the base's weights.
        several: several of it can share a base.
        encoder: goes on text encoders of `model_type: ecd` too.
        learning_rate: its default; None is Ludwig's.
        good_for: when to choose it.
        problem: why it could not be counted.
    """

    type: str
    aliases: list[str]
    family: str
    paper: str
    trained: int | None
    share: float | None
    quantized: list[str]
    mergeable: bool
    several: bool
    encoder: bool
    learning_rate: float | None
    good_for: str
    problem: str | None = None


def methods(base_model: str, config: dict[str, Any] | None = None) -> list[Method]:
    """Return every registered adapter type, by family and name.

    Args:
        base_model: a folder or name of the base on which parameters are counted.
        config: a config whose adapter's options count for its own type.

    Raises:
        ModelError: there is no such base.
    """
    from ludwig.schema.llms.peft import adapter_registry

    from ludwig_peft_plugin.adapters.base import FAMILIES
    from ludwig_peft_plugin.config.adapter_types import AdapterSelection, adapter_class

    own = AdapterSelection().resolve(copy.deepcopy((config or {}).get("adapter")))
    counter = _Counter(base_model)
    found = []
    for name, cls in adapter_registry.items():
        mine = own is not None and adapter_class(str(own.type)) is cls
        found.append(_method(name, cls, own if mine else None, counter))
    order = {family: place for place, family in enumerate(FAMILIES)}
    return sorted(found, key=lambda method: (order.get(method.family, len(order)), method.type))


def as_json(found: list[Method]) -> list[dict[str, Any]]:
    """Return the rows as plain values."""
    return [asdict(method) for method in found]


def show(found: list[Method], base_model: str, console: Console) -> None:
    """Print the rows as a table."""
    table = Table(title=f"adapter.type, trained on {base_model}", show_lines=False)
    for heading in ("family", "type", "trained", "quantised bases", "merges", "good for", "paper"):
        table.add_column(heading, justify="right" if heading == "trained" else "left", overflow="fold")
    last = None
    for method in found:
        if last is not None and method.family != last:
            table.add_section()
        names = method.type + (f" ({', '.join(method.aliases)})" if method.aliases else "")
        share = "-" if method.share is None else f"{method.share:.3%}"
        table.add_row(
            "" if method.family == last else method.family,
            names,
            share,
            ", ".join(method.quantized) or "no",
            "yes" if method.mergeable else "no",
            method.good_for,
            method.paper,
        )
        last = method.family
    console.print(table)
    for method in found:
        if method.problem is not None:
            console.print(f"{method.type} could not be counted: {method.problem}", markup=False, highlight=False)


def _method(name: str, cls: Any, adapter: Any, counter: _Counter) -> Method:
    from ludwig_peft_plugin.config.adapter_types import capabilities

    able = capabilities(cls)
    quantized = ["4 bit", "8 bit"] if able.quantized_base else []
    trained = total = problem = None
    try:
        adapter = cls.model_validate({"type": name}) if adapter is None else adapter
        trained, total = counter.count(adapter)
    except Exception as error:  # a type of someone else's may fail in any way; the others are still shown
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Method(
        type=name,
        aliases=list(getattr(cls, "aliases", ())),
        family=getattr(cls, "family", "Ludwig's own"),
        paper=getattr(cls, "paper", ""),
        trained=trained,
        share=trained / total if trained is not None and total else None,
        quantized=[*quantized, *(["torchao"] if able.torchao_base else [])],
        mergeable=able.mergeable,
        several=bool(getattr(cls, "several", True)),
        encoder=bool(getattr(cls, "encoder", True)),
        learning_rate=getattr(cls, "learning_rate", None),
        good_for=getattr(cls, "good_for", ""),
        problem=problem,
    )


class _Counter:
    """Counts what adapters train on one base, which exists only as shapes."""

    def __init__(self, base_model: str) -> None:
        from types import SimpleNamespace

        from ludwig_peft_plugin.model.base_model import load_model_config

        wanted = SimpleNamespace(base_model=base_model, trust_remote_code=False, model_parameters=None)
        self._config = load_model_config(wanted)

    def count(self, adapter: Any) -> tuple[int, int]:
        """Return how many parameters are trained, and how many there are."""
        import torch

        from ludwig_peft_plugin.adapters.build import attach_adapter
        from ludwig_peft_plugin.estimate.gpu_view import gpu_view
        from ludwig_peft_plugin.estimate.meta_model import META
        from ludwig_peft_plugin.estimate.no_data import NoData
        from ludwig_peft_plugin.estimate.quantise import copyable_weights

        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    base = self._base(META)
                    size = sum(parameter.numel() for parameter in base.parameters())
                    with copyable_weights(), gpu_view(), NoData():
                        return _counts(attach_adapter(base, adapter))
                except Exception:
                    # Some methods look at the base's numbers when they are made.
                    if size > SMALL:
                        raise
                    with torch.random.fork_rng(devices=[]):
                        base = self._base(torch.device("cpu"))
                        return _counts(attach_adapter(base, adapter, batches=lambda: [_any_batch()]))
        finally:
            logging.disable(level)

    def _base(self, device: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        with device, no_init_weights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self._config), dtype=torch.float32)
        model.tie_weights()
        if device.type != "meta":
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        return model.requires_grad_(False)


def _any_batch() -> dict[str, Any]:
    """Return a batch of rows, (2, 128), for methods whose start reads some; what they say does not change sizes."""
    import torch

    ids = torch.arange(256).view(2, 128) % 64
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _counts(model: Any) -> tuple[int, int]:
    parameters = list(model.parameters())
    return (
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        sum(parameter.numel() for parameter in parameters),
    )
