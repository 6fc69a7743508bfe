"""A method that the plugin has not seen, of a newer PEFT: a type by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from ludwig_peft_plugin.adapters.peft_methods import METHODS
from ludwig_peft_plugin.adapters.peft_registry import methods, register_remaining
from ludwig_peft_plugin.adapters.peft_type import register_tuner
from ludwig_peft_plugin.config.sections import options


@dataclass
class NewConfig(PeftConfig):
    """The config of a method that a later PEFT might have."""

    target_modules: list[str] | str | None = None
    gain: float = field(default=0.5, metadata={"help": "How strong it is."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["NEWEST"]


class NewLayer(BaseTunerLayer):
    """What all layers of the method share."""

    adapter_layer_names = ("newest_shift",)


class NewLinear(nn.Module, NewLayer):
    """Adds a trained vector."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, gain: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gain = gain
        self.newest_shift = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(base_layer.out_features))})
        self._active_adapter, self.merged_adapters = adapter_name, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `W x + gain d`."""
        y: torch.Tensor = self.base_layer(x)
        return y if self.disable_adapters else y + self.gain * self.newest_shift["default"]


class NewModel(BaseTuner):
    """Puts the layers on a model."""

    prefix = "newest_"
    tuner_layer_cls = NewLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {"llama": ["q_proj"]}

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: Any, name: str, parent: Any, **_: Any
    ) -> None:
        self._replace_module(parent, name, NewLinear(target, adapter_name, config.gain), target)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """PEFT with one more method."""
    monkeypatch.setattr(adapter_registry, "data", dict(adapter_registry.data))
    register_tuner("newest", NewConfig, NewModel)
    yield "newest"
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del mapping[PeftType["NEWEST"]]
    METHODS.pop("NEWEST", None)


def test_a_method_of_a_newer_peft_is_a_type_by_itself(newest: str, tiny: Any) -> None:
    assert register_remaining() == [newest]
    assert methods()["NEWEST"] is None
    cls = adapter_registry[newest]
    assert options(cls)["gain"].default == 0.5
    assert options(cls)["gain"].description == "How strong it is."
    assert (cls.quantized_base, cls.mergeable) == (True, False)  # it calls its base layer, and has no `merge`
    for bits in (None, 4):
        base = tiny.base(bits=bits)
        before = tiny.logits(base)
        model = tiny.attach(cls(gain=2.0), base)
        assert torch.equal(tiny.logits(model), before)
        tiny.train(model)
        assert not torch.allclose(tiny.logits(model), before)
