"""Rows that are longer than they may be: what is cut or dropped, and how it is counted and said."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ludwig_peft_plugin.data.ragged import Ragged, join_rows
from ludwig_peft_plugin.errors import DataError

logger = logging.getLogger(__name__)

OVERLONG = ("truncate", "drop", "keep", "error")


@dataclass(frozen=True)
class LengthLimits:
    """How many tokens a row and its parts may have.

    Attributes:
        prompt: of the prompt (the input feature's `max_sequence_length`), None for no limit. Its end is cut.
        target: of the target before eos (the output feature's `max_sequence_length`), None for no limit.
        row: of prompt, target and eos together (`global_max_sequence_length`, at most the model's context).
        context: what the model was made for.
        overlong: what is done with rows over `row`: `truncate` keeps the prompt and cuts the target's end, `drop`
            leaves the row out, `keep` trains it whole as far as `context` allows, `error` stops.
    """

    prompt: int | None
    target: int | None
    row: int
    context: int
    overlong: str = "truncate"

    @classmethod
    def of(cls, config: dict[str, Any], context: int) -> LengthLimits:
        """Return the limits of a Ludwig config for a model with this context length."""
        preprocessing = config.get("preprocessing") or {}
        asked = preprocessing.get("global_max_sequence_length")
        if asked is not None and asked > context:
            logger.warning(
                "preprocessing.global_max_sequence_length: %d is more than the model's context of %d tokens, "
                "which is used instead.",
                asked,
                context,
            )
        return cls(
            prompt=_feature_limit(config["input_features"][0]),
            target=_feature_limit(config["output_features"][0]),
            row=min(asked or context, context),
            context=context,
            overlong=preprocessing.get("overlong") or "truncate",
        )

    @property
    def bound(self) -> int:
        """The most tokens a row has after cutting."""
        return self.context if self.overlong == "keep" else self.row

    def check_template(self, tokens: int) -> None:
        """Refuse a prompt template that alone is as long as a prompt or row may be.

        Raises:
            DataError: of its own text there are `tokens` tokens.
        """
        for limit, option in (
            (self.prompt, "the input feature's preprocessing.max_sequence_length"),
            (
                self.bound - 1,
                "preprocessing.global_max_sequence_length or the model's context, less one for the answer",
            ),
        ):
            if limit is not None and tokens > limit:
                raise DataError(
                    f"prompt.template alone has {tokens} tokens, more than the {limit} of {option}: nothing of the "
                    "data would be left. Shorten the template or raise the limit."
                )


@dataclass
class LengthReport:
    """What the limits did to the rows of one split."""

    rows: int = 0
    longest: int = 0
    over: int = 0
    prompts_cut: int = 0
    targets_limited: int = 0
    targets_cut: int = 0
    kept_whole: int = 0
    dropped: int = 0
    longest_prompt: int = 0
    longest_target: int = 0

    def say(self, split: str, limits: LengthLimits) -> None:
        """Log one warning if anything was cut, dropped or kept over the limit.

        Raises:
            DataError: rows are over the limit and the config says that is an error.
        """
        if self.over and limits.overlong == "error":
            raise DataError(
                f"Of {self.rows:,} {split} rows, more than {limits.row:,} tokens: {self.over:,} (the longest has "
                f"{self.longest:,}), and preprocessing.overlong is error. Use truncate, drop or keep, or raise "
                "preprocessing.global_max_sequence_length."
            )
        said = [self._features(limits)] if self.prompts_cut or self.targets_limited else []
        if self.over:
            counts = {"target cut": self.targets_cut, "kept whole": self.kept_whole, "dropped": self.dropped}
            done = ", ".join(f"{what}: {count:,}" for what, count in counts.items() if count)
            said.append(
                f"rows of more than {limits.row:,} tokens: {self.over:,} (the longest has {self.longest:,}; "
                f"preprocessing.overlong: {limits.overlong}), of which {done}"
            )
        self._warn(split, said)

    def say_prompts(self, split: str, limit: int, limits: LengthLimits) -> None:
        """Log one warning if prompts to generate from were cut, to `limit` tokens where new ones need the room."""
        said = [self._features(limits)] if self.prompts_cut else []
        if self.over:
            said.append(
                f"prompts of more than {limit:,} tokens: {self.over:,} (the longest has {self.longest:,}); they lost "
                f"their beginning, so that there is room for new tokens in the context of {limits.context:,}"
            )
        self._warn(split, said)

    def _features(self, limits: LengthLimits) -> str:
        parts = []
        if self.prompts_cut:
            parts.append(f"prompts cut to the input feature's {limits.prompt:,} tokens: {self.prompts_cut:,}")
        if self.targets_limited:
            parts.append(f"targets cut to the output feature's {limits.target:,} tokens: {self.targets_limited:,}")
        return "; ".join(parts)

    def _warn(self, split: str, said: list[str]) -> None:
        if said:
            logger.warning("%s, %s rows; %s.", split, f"{self.rows:,}", "; ".join(said))


def fit_rows(
    prompts: Ragged, targets: Ragged, limits: LengthLimits, report: LengthReport
) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """Return the rows that fit, counting in `report` what it took.

    A target that is cut, for whichever limit, ends without eos: the model must not learn to stop in the middle.

    Args:
        prompts: the prompts' tokens.
        targets: the targets' tokens, each with eos at its end.
        limits: what is allowed.
        report: counts, added to.

    Returns:
        The tokens of prompt and target together; how many of each row are prompt, shape (kept,), int32; and which of
        the given rows these are, shape (kept,).
    """
    prompt, target = prompts.lengths, targets.lengths
    report.rows += len(prompt)
    report.longest = max(report.longest, int((prompt + target).max(initial=0)))
    if limits.prompt is not None:
        report.prompts_cut += int((prompt > limits.prompt).sum())
        prompt = np.minimum(prompt, limits.prompt)
    if limits.target is not None:
        too_long = target - 1 > limits.target
        report.targets_limited += int(too_long.sum())
        target = np.where(too_long, limits.target, target)
    over = prompt + target > limits.row
    report.over += int(over.sum())
    keep = np.ones(len(prompt), dtype=bool)
    if limits.overlong == "drop":
        keep = ~over
    elif limits.overlong == "keep":
        report.kept_whole += int((over & (prompt + target <= limits.bound)).sum())
    room = np.maximum(limits.bound - prompt, 0)
    keep &= room > 0
    report.dropped += int((~keep).sum())
    report.targets_cut += int((keep & (target > room)).sum())
    target = np.minimum(target, room)
    kept = np.flatnonzero(keep)
    prompt, target = prompt[kept], target[kept]
    report.longest_prompt = max(report.longest_prompt, int(prompt.max(initial=0)))
    report.longest_target = max(report.longest_target, int(target.max(initial=0)))
    rows = join_rows(
        prompts.pieces(prompts.offsets[:-1][kept], prompt), targets.pieces(targets.offsets[:-1][kept], target)
    )
    return rows, prompt.astype(np.int32), kept


def fit_prompts(prompts: Ragged, first: int, limit: int, limits: LengthLimits, report: LengthReport) -> Ragged:
    """Return prompts to generate from, none dropped, each at most `limit` tokens.

    The end of a prompt says what is asked, so the middle goes: its `first` special tokens and its end stay.
    """
    lengths = prompts.lengths
    report.rows += len(lengths)
    report.longest = max(report.longest, int(lengths.max(initial=0)))
    if limits.prompt is not None:
        report.prompts_cut += int((lengths > limits.prompt).sum())
        lengths = np.minimum(lengths, limits.prompt)
    report.over += int((lengths > limit).sum())
    report.longest_prompt = max(report.longest_prompt, int(np.minimum(lengths, limit).max(initial=0)))
    starts = prompts.offsets[:-1]
    if not (lengths > limit).any():
        return prompts if limits.prompt is None else prompts.pieces(starts, lengths)
    first = min(first, limit)
    head = np.where(lengths > limit, first, 0)
    tail = np.minimum(lengths - head, limit - head)
    return join_rows(prompts.pieces(starts, head), prompts.pieces(starts + lengths - tail, tail))


def context_for_rows(config: Any, context: int) -> int:
    """Return how many tokens of a model's context are left for a row: virtual tokens of adapters take the first.

    Args:
        config: Ludwig's config object.
        context: what the model was made for.
    """
    several = getattr(config, "adapters", None)
    adapters = [getattr(config, "adapter", None), *(several.objects().values() if several is not None else ())]
    taken = max(getattr(adapter, "context_tokens", 0) for adapter in adapters)
    return max(1, context - taken)


def _feature_limit(feature: dict[str, Any]) -> int | None:
    preprocessing = feature.get("preprocessing") or {}
    limit = preprocessing.get("sequence_length") or preprocessing.get("max_sequence_length")
    return None if limit is None else int(limit)
