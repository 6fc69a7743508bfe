"""PEFT tuners that train chosen parameters of the base, each by a copy of it (see layer.py)."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import PeftType
from torch import nn

from ludwig_peft_plugin.adapters.selective.base_model import base_modules, base_parameters, is_norm, targeted
from ludwig_peft_plugin.adapters.selective.config import SelectiveConfig, norm_names
from ludwig_peft_plugin.adapters.selective.layer import BitFitLayer, NormLayer, SelectedLayer, SelectiveLayer
from ludwig_peft_plugin.errors import AdapterError


class SelectiveModel(BaseTuner):
    """Wraps the modules that own the parameters a `SelectiveConfig` names."""

    tuner_layer_cls: type[SelectiveLayer]
    _chosen: dict[str, list[str]]
    """Names of the parameters to train by the name of their module, of the adapter that is being added."""
    _shared: dict[int, nn.Parameter]
    """Its copies so far, by the identity of their originals."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # what is trained follows from the model itself, not from its name

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._shared, self._chosen = {}, {}
        for name in self._parameter_names(peft_config, model):
            module, _, own_name = name.rpartition(".")
            self._chosen.setdefault(module, []).append(own_name)
        if missing := sorted(self._chosen.keys() - {name for name, _ in base_modules(model)}):
            raise AdapterError(f"the base has no module {missing[0]!r}, whose parameters the adapter trains.")

    def _parameter_names(self, config: SelectiveConfig, model: nn.Module) -> list[str]:
        """Return the full names of the parameters to train."""
        config.resolve(model)
        assert config.parameter_names is not None
        return config.parameter_names

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        return key in self._chosen

    def _check_merge_allowed(self) -> None:
        """Allow it: PEFT warns of tied weights, of which every place has the same copy here."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        known = isinstance(target, SelectiveLayer)
        layer = target if isinstance(target, SelectiveLayer) else self.tuner_layer_cls(target)
        layer.update_layer(adapter_name, self._chosen[current_key], self._shared, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.copies[adapter_name].requires_grad_(False)
        if not known:
            self._replace_module(parent, target_name, layer, target)


class BitFitModel(SelectiveModel):
    """Trains biases."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer


class SelectedLayersModel(SelectiveModel):
    """Trains the weights of layers."""

    prefix = "selected_layers_"
    tuner_layer_cls = SelectedLayer


class NormTuningModel(SelectiveModel):
    """PEFT's LN tuning with copies in float32 over a 16-bit base: an update of 0.001 would be lost in bfloat16 near 1.

    Config and saved adapter are PEFT's own, so that each loads what the other has saved.
    """

    prefix = "ln_tuning_"
    tuner_layer_cls = NormLayer

    def _parameter_names(self, config: Any, model: nn.Module) -> list[str]:
        if config.target_modules is None:
            config.target_modules = norm_names(model)
        excluded = config.exclude_modules or []
        for rule in [excluded] if isinstance(excluded, str) else [[entry] for entry in excluded]:
            if not any(targeted(name, rule) for name in norm_names(model)):
                entry = rule if isinstance(rule, str) else rule[0]
                raise AdapterError(f"adapter.exclude_modules: {entry!r} matches no normalisation; correct it.")
        modules = {
            name: module for name, module in base_modules(model) if name and check_target_module_exists(config, name)
        }
        others = [name for name, module in modules.items() if not is_norm(module)]
        leaves = sorted({name.rsplit(".", 1)[-1] for name, module in base_modules(model) if is_norm(module)})
        if not modules:
            raise AdapterError(
                f"adapter.target_modules: {config.target_modules!r} leaves no normalisation to train. Those of this "
                f"model are called {', '.join(leaves)}; null takes all."
            )
        if others:
            raise AdapterError(
                f"adapter.target_modules: {others[0]!r} is a {type(modules[others[0]]).__name__}, not a normalisation "
                f"with weights. Those of this model are called {', '.join(leaves)}; for other weights use type layers."
            )
        return [name for name, _, _, _ in base_parameters(model) if name.rpartition(".")[0] in modules]

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        return check_target_module_exists(peft_config, key)  # which tells excluded modules from others


def replace_ln_tuning() -> None:
    """Have PEFT build LN tuning with `NormTuningModel`."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LN_TUNING] = NormTuningModel
