"""`adapter: {type: road}`: pairs of outputs turned and stretched."""

from typing import TYPE_CHECKING, Any, ClassVar

from ludwig_peft_plugin.adapters.peft_method import PeftMethod, peft_method
from ludwig_peft_plugin.adapters.peft_schema import Values, one_of
from ludwig_peft_plugin.adapters.shapes import Shapes, check_divides, largest_common, outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 64


@peft_method("road")
class RoadConfig(PeftMethod):
    r"""RoAd, Liao and Monz 2024 (https://arxiv.org/abs/2409.00119).

    The outputs of a layer are taken in pairs, and each pair is turned by a trained angle and stretched by a trained
    factor: `R (W x)`, R of shape [out, out] with 2 x 2 blocks. `road_1` has one angle and factor per pair, `road_2` two
    of each, `road_4` four. Angles start at zero and factors at one, so the adapted model starts as the base.

    Within a group of `group_size` outputs the first half is paired with the second; how large groups are matters for
    speed alone.
    """

    paper: ClassVar[str] = "Liao and Monz 2024, https://arxiv.org/abs/2409.00119"
    good_for: ClassVar[str] = "very few parameters; many adapters served in one batch"
    learning_rate: ClassVar[float | None] = 1e-2
    peft_type: ClassVar[str] = "ROAD"
    title: ClassVar[str] = "RoAd"
    summary: ClassVar[str] = "Turns and stretches pairs of each layer's outputs."
    defaults: ClassVar[dict[str, Any]] = {"group_size": None}
    values: ClassVar[dict[str, Values]] = {
        "variant": one_of("road_1", "road_2", "road_4"),
        "group_size": Values({"type": "integer", "minimum": 2, "multipleOf": 2}, "an even number of at least 2"),
    }
    texts: ClassVar[dict[str, str]] = {
        "variant": "`road_1`, `road_2` or `road_4`: how many angles and factors a pair has.",
        "group_size": "Outputs per group; even, and divides the outputs of every adapted layer. Null is 64 where that "
        "fits.",
        "init_weights": "Whether angles start at zero and factors at one. With false they are random, which changes "
        "the model before it is trained.",
    }

    def fitted(self, base: "PreTrainedModel", shapes: Shapes) -> dict[str, Any]:
        """Choose the group size, and check one that is given."""
        options: Any = self
        sizes = outputs(shapes)
        group = options.group_size or largest_common(sizes, GROUP)
        check_divides("group_size", group, sizes, "outputs")
        return {"group_size": group}
