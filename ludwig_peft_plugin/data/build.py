"""From a table of rows to token rows: prompts rendered, texts tokenised, lengths kept, a chunk at a time.

Only a chunk is ever held as Python lists; what is finished goes to a `TokenRowsWriter`, which keeps little in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ludwig_peft_plugin.data import cells
from ludwig_peft_plugin.data.lengths import LengthLimits, LengthReport, fit_prompts, fit_rows
from ludwig_peft_plugin.data.missing import missing_text
from ludwig_peft_plugin.data.prompts import PlainPrompt, PromptTemplate
from ludwig_peft_plugin.data.ragged import Ragged
from ludwig_peft_plugin.data.tasks import TaskColumn
from ludwig_peft_plugin.data.token_dataset import TokenDataset
from ludwig_peft_plugin.data.token_rows import TokenRows, TokenRowsWriter
from ludwig_peft_plugin.data.tokens import AutomaticTokens, encode_prompts, encode_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 4096  # rows


@dataclass(frozen=True)
class TokenSettings:
    """Everything that is the same for all rows of all sets, whatever the data are.

    Attributes:
        tokenizer: with eos and pad token.
        input_feature: the config's input feature.
        output_feature: the config's output feature.
        limits: how long rows may be.
        new_tokens: how many tokens prediction may add to a prompt.
        tasks: where a row's task is found, for adapters with tasks.
    """

    tokenizer: PreTrainedTokenizerBase
    input_feature: dict[str, Any]
    output_feature: dict[str, Any]
    limits: LengthLimits
    new_tokens: int
    tasks: TaskColumn | None = None

    def dataset(self, rows: TokenRows) -> TokenDataset:
        """Return rows as the dataset that the model trains on or predicts from."""
        texts = {self.input_feature["name"]: rows.prompts}
        if rows.targets is not None:
            texts[self.output_feature["name"]] = rows.targets
        features = (self.input_feature, self.output_feature)
        return TokenDataset(
            rows.tokens,
            rows.prompt_lengths,
            pd.DataFrame({name: _series(column) for name, column in texts.items()}),
            has_targets=rows.targets is not None,
            pad_id=self.tokenizer.pad_token_id,
            proc_columns={feature["name"]: feature.get("proc_column") or feature["name"] for feature in features},
            tasks=rows.tasks,
        )


@dataclass(frozen=True)
class RowTokenizer:
    """Makes token rows of a table's rows.

    Attributes:
        settings: what is the same for all data.
        prompt: how to make a row's prompt.
        folder: for what does not stay in memory; None is the system's folder for temporary files.
    """

    settings: TokenSettings
    prompt: PromptTemplate | PlainPrompt
    folder: str | None = None

    def template_tokens(self) -> int:
        """Return how many tokens the template's own text has."""
        return len(self._encode_prompts([self.prompt.fixed_text])[0]) if self.prompt.fixed_text else 0

    def with_targets(
        self,
        frame: pd.DataFrame,
        places: np.ndarray,
        column: str,
        split: str,
        progress: Callable[[int], None],
        remaining: list[np.ndarray] | None = None,
    ) -> tuple[TokenRows, LengthReport]:
        """Return rows with targets, those that are too long treated as the config asks, and what that took.

        Args:
            frame: the table; none of the rows misses its target.
            places: which of its rows, in which order, shape (n,).
            column: the target's column.
            split: what the rows are called in messages.
            progress: called with the number of rows done since the last call.
            remaining: gets the places of the rows that stay, a chunk at a time.

        Raises:
            DataError: rows are too long and the config says that is an error, or there is no room for the tokens.
        """
        limits, writer, report = self.settings.limits, TokenRowsWriter(targets=True, folder=self.folder), LengthReport()
        for number, rows in enumerate(_chunks(frame, places)):
            prompts, targets, tasks = self._prompts(rows), self._targets(rows[column]), self._tasks(rows)
            encoded = self._encode_prompts(prompts), encode_targets(self.settings.tokenizer, targets)
            tokens, prompt_lengths, kept = fit_rows(*encoded, limits, report)
            if remaining is not None:
                remaining.append(places[number * CHUNK : number * CHUNK + len(rows)][kept])
            if len(kept) < len(rows):
                prompts, targets = [prompts[row] for row in kept], [targets[row] for row in kept]
            writer.add(tokens, prompt_lengths, prompts, targets, None if tasks is None else tasks[kept])
            progress(len(rows))
        report.say(split, limits)
        return writer.finish(), report

    def prompts_only(self, frame: pd.DataFrame, split: str, progress: Callable[[int], None]) -> TokenRows:
        """Return prompts to generate from; each row stays, cut at its beginning where new tokens need the room."""
        limits = self.settings.limits
        # A limit on new tokens of the context's size must not leave prompts without any room.
        limit = max(1, limits.context - min(self.settings.new_tokens, limits.context // 2))
        writer, report = TokenRowsWriter(targets=False, folder=self.folder), LengthReport()
        for rows in _chunks(frame, np.arange(len(frame))):
            prompts = self._prompts(rows)
            tokens = fit_prompts(self._encode_prompts(prompts), len(self._automatic.before), limit, limits, report)
            writer.add(tokens, tokens.lengths, prompts, tasks=self._tasks(rows))
            progress(len(rows))
        report.say_prompts(split, limit, limits)
        return writer.finish()

    @cached_property
    def _automatic(self) -> AutomaticTokens:
        return AutomaticTokens.of(self.settings.tokenizer)

    @cached_property
    def _missing(self) -> str:
        return missing_text(self.settings.input_feature)

    def _prompts(self, rows: pd.DataFrame) -> list[str]:
        return _clean(self.prompt.render(rows, self._missing), self.settings.input_feature)

    def _tasks(self, rows: pd.DataFrame) -> np.ndarray | None:
        return None if self.settings.tasks is None else self.settings.tasks.numbers(rows)

    def _targets(self, column: pd.Series) -> list[str]:
        return _clean(cells.texts(column), self.settings.output_feature)

    def _encode_prompts(self, texts: list[str]) -> Ragged:
        return encode_prompts(self.settings.tokenizer, texts, self._automatic)


def _series(column: pa.LargeStringArray) -> pd.Series:
    """Return Arrow text as a column, over the same memory."""
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([column])))


def _chunks(frame: pd.DataFrame, places: np.ndarray) -> Iterator[pd.DataFrame]:
    for start in range(0, len(places), CHUNK):
        yield frame.iloc[places[start : start + CHUNK]]


def _clean(texts: list[str], feature: dict[str, Any]) -> list[str]:
    """Return the texts in lower case where the feature asks for it, and with halves of characters made whole.

    JSON can hold a character as two escapes, or only one of them; neither a tokenizer nor a file takes such halves.
    """
    if (feature.get("preprocessing") or {}).get("lowercase"):
        texts = [text.lower() for text in texts]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    return texts
