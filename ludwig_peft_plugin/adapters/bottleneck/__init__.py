"""Bottleneck adapters as a tuner of PEFT. Importing this package makes `peft_type: BOTTLENECK` known to PEFT."""

from ludwig_peft_plugin.adapters.bottleneck.config import NAME, BottleneckConfig
from ludwig_peft_plugin.adapters.bottleneck.layer import BottleneckLayer
from ludwig_peft_plugin.adapters.bottleneck.model import BottleneckModel
from ludwig_peft_plugin.adapters.peft_type import register_tuner

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel"]

register_tuner(NAME.lower(), BottleneckConfig, BottleneckModel)
