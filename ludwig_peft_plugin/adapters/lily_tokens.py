"""Lily whose router decides for each token by itself, as a PEFT tuner; importing and registering makes PEFT know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lily import LilyConfig, LilyModel
from peft.tuners.lily.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn

from ludwig_peft_plugin.adapters.peft_type import register_tuner

PEFT_TYPE = "LILY_TOKENS"


@dataclass
class LilyTokensConfig(LilyConfig):
    """`peft.LilyConfig` for layers that route each token by itself."""

    def __post_init__(self) -> None:
        """Check the options, and say which tuner they are for."""
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]


class LilyTokensLinear(Linear):
    """A linear layer with Lily."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `W x + scaling sum_e p_e B_e A x` with `p = softmax(R A x)`; (..., in) to (..., out)."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.lily_A:
                continue
            hidden = self.lily_A[name](self._cast_input_dtype(x, self.lily_A[name].weight.dtype))
            shares = torch.softmax(self.lily_router[name](hidden), dim=-1)
            # (..., e, r): the hidden state weighted for each B, so that one product applies and adds them all.
            weighted = shares.unsqueeze(-1) * hidden.unsqueeze(-2)
            matrices = self.lily_B[name].weight.reshape(self.num_B[name] * hidden.shape[-1], -1)
            result = result + (weighted.flatten(-2) @ matrices * self.scaling[name]).to(dtype)
        return result


class LilyTokensModel(LilyModel):
    """`peft.LilyModel` with these layers."""

    @staticmethod
    def _create_new_module(lily_config: Any, adapter_name: str, target: nn.Module) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):
            raise TypeError(f"Lily is for linear layers, and the target is a {type(base).__name__}.")
        return LilyTokensLinear(target, adapter_name, r=lily_config.r, config=lily_config)


def register_lily_tokens() -> None:
    """Make PEFT know the tuner, so that `PeftModel.from_pretrained` loads its folders."""
    register_tuner("lily_tokens", LilyTokensConfig, LilyTokensModel)


register_lily_tokens()
