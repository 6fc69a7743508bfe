"""The tuner: puts bottleneck layers into a model and takes them out again."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ludwig_peft_plugin.adapters.bottleneck.config import BottleneckConfig
from ludwig_peft_plugin.adapters.bottleneck.layer import MERGE_REFUSAL, BottleneckLayer
from ludwig_peft_plugin.adapters.bottleneck.places import Site, find_sites


class BottleneckModel(BaseTuner):
    """A transformers model with bottleneck adapters, which PEFT makes for `peft_type: BOTTLENECK`.

    `get_peft_model`, `load_adapter`, `set_adapter`, `disable_adapter`, `delete_adapter`, `save_pretrained` and
    `PeftModel.from_pretrained` work as for PEFT's own types. Several active adapters run one after the other.
    """

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT declares it)

    _sites: dict[str, Site]

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        """Find the modules that get an adapter, before any of them is replaced."""
        self._sites = {site.name: site for site in find_sites(model, peft_config)}

    def _check_target_module_exists(self, peft_config: BottleneckConfig, key: str) -> bool:
        return key in self._sites

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, peft_config.inference_mode)
            return
        site = self._sites[current_key]
        residual = self.model.get_submodule(site.residual)
        norm = self.model.get_submodule(site.norm) if site.norm else None
        layer = BottleneckLayer(target, site, residual, norm)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config, peft_config.inference_mode)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put the base's module back."""
        if isinstance(child, BottleneckLayer):
            child.tap_handle.remove()
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSAL)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refuse: there are no weights that would do the same."""
        raise ValueError(MERGE_REFUSAL)
