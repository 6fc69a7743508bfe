"""Tuners that train chosen weights of the base: copies of them, beside frozen originals. Importing registers them."""

from ludwig_peft_plugin.adapters.peft_type import register_tuner
from ludwig_peft_plugin.adapters.selective.config import BitFitConfig, SelectedLayersConfig
from ludwig_peft_plugin.adapters.selective.model import BitFitModel, SelectedLayersModel, replace_ln_tuning

register_tuner("bitfit", BitFitConfig, BitFitModel)
register_tuner("layers", SelectedLayersConfig, SelectedLayersModel)
replace_ln_tuning()

__all__ = ["BitFitConfig", "SelectedLayersConfig"]
