"""The `trainer` section of `type: finetune`: Ludwig's, and how rows are grouped, compiled and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ludwig.schema import utils as schema_utils
from ludwig.schema.trainer import FineTuneTrainerConfig as StockFineTuneTrainerConfig
from ludwig.schema.trainer import register_llm_trainer_schema

from ludwig_peft_plugin.config.problems import Problem
from ludwig_peft_plugin.config.raw import section, trainer_type


class FineTuneTrainerConfig(StockFineTuneTrainerConfig):
    """How a language model is fine-tuned."""

    batch_size: int | str | None = schema_utils.OneOfOptionsField(
        default=1,
        allow_none=False,
        description=(
            "The examples of a batch, which go through the model together. `auto` measures on the device, with the "
            "longest rows of the data, which size is fastest and leaves a tenth of the memory free; with `packing` it "
            "finds `tokens_per_batch`. An optimiser step is `gradient_accumulation_steps` batches."
        ),
        field_options=[
            schema_utils.PositiveInteger(default=1, description="", allow_none=False),
            schema_utils.StringOptions(options=["auto"], default="auto", allow_none=False),
        ],
    )

    tokens_per_batch: int | None = schema_utils.PositiveInteger(
        default=None,
        allow_none=True,
        description=(
            "The tokens of a batch, instead of `batch_size` examples: as many whole rows as fit. At least the length "
            "of the longest row. A row's last token does not count, since it is only predicted."
        ),
    )

    packing: bool = schema_utils.Boolean(
        default=False,
        description=(
            "Whether rows are chosen so that every batch is full: best fit, longest first, never cut, and no row sees "
            "another. A batch has `tokens_per_batch` tokens, or `batch_size` x "
            "`preprocessing.global_max_sequence_length` (without that: the longest row of the data)."
        ),
    )

    compile: bool = schema_utils.Boolean(
        default=False,
        description=(
            "Whether decoder layers that have no fused kernels are compiled by torch.compile, which takes a minute at "
            "the start and makes steps faster. Best with `packing` or `tokens_per_batch`: then all batches have one "
            "length, and nothing is compiled twice."
        ),
    )

    enable_gradient_checkpointing: bool = schema_utils.Boolean(
        default=False,
        description=(
            "Whether only each layer's input is kept for the backward pass, and the rest computed again: a fraction "
            "of the memory for about a third more time."
        ),
    )

    checkpoint_layers: float = schema_utils.FloatRange(
        default=1.0,
        min=0,
        max=1,
        min_inclusive=False,
        description=(
            "The share of the layers, counted from the first, that `enable_gradient_checkpointing` is for. Less than 1 "
            "costs memory and saves time."
        ),
    )

    embedding_offload: bool = schema_utils.Boolean(
        default=False,
        description=(
            "Whether a frozen input embedding stays in the host's memory, from which the GPU reads the rows of a "
            "batch's tokens: saves vocabulary x hidden size x 2 bytes. Not for embeddings that are trained or are the "
            "output matrix too."
        ),
    )

    checkpoint_offload: bool = schema_utils.Boolean(
        default=False,
        description=(
            "Whether the layer inputs that `enable_gradient_checkpointing` keeps wait in the host's memory instead of "
            "the GPU's."
        ),
    )


def register_trainer_config() -> None:
    """Make `trainer.type: finetune` of a language model resolve to the plugin's section."""
    register_llm_trainer_schema("finetune")(FineTuneTrainerConfig)


def trainer_problems(config: dict[str, Any]) -> Iterator[Problem]:
    """Yield the options of the trainer that cannot take effect together."""
    if trainer_type(config) != "finetune":
        return
    trainer = section(config, "trainer")
    tokens = trainer.get("tokens_per_batch") is not None
    counted = "tokens_per_batch" if tokens else "packing"
    if tokens and trainer.get("batch_size") == "auto":
        yield Problem(
            "trainer.batch_size", "`auto` looks for a size, and tokens_per_batch gives one; remove one of them"
        )
    elif tokens and trainer.get("batch_size") not in (None, 1):
        yield Problem(
            "trainer.batch_size",
            "is not read beside tokens_per_batch; remove one of them (eval_batch_size is that of evaluation)",
        )
    if tokens or trainer.get("packing") is True:
        if trainer.get("effective_batch_size") not in (None, "auto"):
            yield Problem(
                "trainer.effective_batch_size",
                f"counts examples, and with {counted} batches are counted in tokens; use gradient_accumulation_steps",
            )
        if trainer.get("increase_batch_size_on_plateau"):
            yield Problem(
                "trainer.increase_batch_size_on_plateau",
                f"has no effect with {counted}, by which the rows of a batch are fixed for the whole run; remove it",
            )
    if trainer.get("enable_gradient_checkpointing") is not True:
        remedy = "set enable_gradient_checkpointing: true too"
        if trainer.get("checkpoint_offload") is True:
            yield Problem("trainer.checkpoint_offload", f"moves what gradient checkpointing keeps; {remedy}")
        if trainer.get("checkpoint_layers") not in (None, 1, 1.0):
            yield Problem("trainer.checkpoint_layers", f"says which layers are checkpointed; {remedy}")
