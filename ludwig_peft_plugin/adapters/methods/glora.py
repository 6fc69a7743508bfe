"""`adapter: {type: glora}`: weights and biases scaled and shifted by small matrices, vectors or numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method


@peft_method("glora")
class GloraConfig(PeftMethod):
    r"""GLoRA, Chavan et al. 2023 (https://arxiv.org/abs/2306.07967).

    A layer computes `(W + W * A + B) x + b + b * D + e + W c`, with `*` the product by element. A and B are low-rank
    products, vectors or numbers (`config_A_B`), c a vector [in] of low rank or none (`config_C`), D and e vectors or
    numbers (`config_D_E`); those of the bias are left out where a layer has none. All start at zero, so the adapted
    model starts as the base.

    The adapted weight is built in every forward pass, which costs a weight's worth of memory per layer.
    """

    paper: ClassVar[str] = "Chavan et al. 2023, https://arxiv.org/abs/2306.07967"
    good_for: ClassVar[str] = "scaling and shifting weights at once"
    learning_rate: ClassVar[float | None] = 1e-3
    peft_type: ClassVar[str] = "GLORA"
    title: ClassVar[str] = "GLoRA"
    summary: ClassVar[str] = "Trains low-rank factors that scale each weight and shift it, and the same for biases."
    texts: ClassVar[dict[str, str]] = {
        "r": "Rank where a part is `lora`.",
        "config_A_B": "What scales and shifts weights: `lora` (low rank), `vector`, `constant` or `none`.",
        "config_C": "What goes from the weight to the bias: `lora`, `vector` or `none`.",
        "config_D_E": "What scales and shifts biases: `vector`, `constant` or `none`.",
    }

    @classmethod
    @contextmanager
    def building(cls) -> Iterator[None]:
        """Have PEFT take subclasses of `nn.Linear` too, as the view on a quantised layer is one."""
        from peft.tuners.glora.layer import GloraLinear
        from peft.tuners.glora.model import GloraModel
        from torch import nn

        stock = GloraModel._create_new_module

        def create(config: Any, adapter_name: str, target: nn.Module, **options: Any) -> nn.Module:
            if isinstance(target, nn.Linear):
                return GloraLinear(target, adapter_name, config=config)
            return stock(config, adapter_name, target, **options)

        GloraModel._create_new_module = staticmethod(create)
        try:
            yield
        finally:
            GloraModel._create_new_module = staticmethod(stock)
