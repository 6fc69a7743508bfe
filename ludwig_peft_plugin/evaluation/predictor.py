"""Evaluate and predict with a `PeftLLM`: exact metrics from one forward pass, answers from batched generation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from ludwig.constants import PREDICTIONS, PROBABILITIES
from ludwig.distributed.base import LocalStrategy
from ludwig.globals import is_progressbar_disabled
from ludwig.models.predictor import BasePredictor, LlmPredictor
from ludwig.progress_bar import LudwigProgressBar

from ludwig_peft_plugin.adapters.several.mixed import generate_by_adapter, groups, using
from ludwig_peft_plugin.data.batches import token_batches
from ludwig_peft_plugin.decoding.memory import pass_tokens
from ludwig_peft_plugin.engine.forward import unwrapped
from ludwig_peft_plugin.errors import DataError, ModelError
from ludwig_peft_plugin.evaluation.examples import Example, make_examples, spread_rows, texts_of
from ludwig_peft_plugin.evaluation.metrics import TokenMetrics
from ludwig_peft_plugin.evaluation.text_metrics import score_texts
from ludwig_peft_plugin.model.generation import Answer, generate_answers

if TYPE_CHECKING:
    from ludwig_peft_plugin.data.token_dataset import TokenDataset
    from ludwig_peft_plugin.model.llm import PeftLLM


def create_predictor(model: Any, *args: Any, **kwargs: Any) -> BasePredictor:
    """Return the predictor for `model`: ours for text answers, Ludwig's for the other kinds of LLM."""
    from ludwig_peft_plugin.model.llm import PeftLLM

    wrapped = kwargs.get("model") or model
    return (
        PeftPredictor(model, *args, **kwargs) if isinstance(wrapped, PeftLLM) else LlmPredictor(model, *args, **kwargs)
    )


class PeftPredictor(BasePredictor):
    """Runs a `PeftLLM` over a `TokenDataset`."""

    def __init__(
        self,
        dist_model: PeftLLM,
        batch_size: int = 128,
        distributed: Any = None,
        report_tqdm_to_ray: bool = False,
        model: PeftLLM | None = None,
        **_: Any,
    ) -> None:
        self.model = model or dist_model
        self.batch_size = batch_size
        self.report_tqdm_to_ray = report_tqdm_to_ray
        self.distributed = distributed or LocalStrategy()

    def batch_evaluation(
        self,
        dataset: TokenDataset,
        collect_predictions: bool = False,
        collect_logits: bool = False,
        dataset_name: str | None = None,
    ) -> tuple[dict[str, dict[str, float]], pd.DataFrame]:
        """Return the metrics over `dataset` and, when asked, generated answers, whose scores are then metrics too.

        Raises:
            DataError: the dataset has no targets to compare with.
        """
        values = self.losses(dataset, dataset_name)
        if not collect_predictions:
            return self.model.named_metrics(values), pd.DataFrame()
        rows = np.arange(len(dataset))
        answers = self.generate(dataset, rows, self.model.generation, dataset_name)
        scores, self.model.examples = self.scores(dataset, rows, answers)
        return self.model.named_metrics(values | scores), self._frame(answers)

    def losses(self, dataset: TokenDataset, dataset_name: str | None = None) -> dict[str, float]:
        """Return the metrics of the targets' own probabilities: loss, perplexity, accuracies.

        Raises:
            DataError: the dataset has no targets to compare with.
        """
        if not dataset.has_targets:
            raise DataError("Evaluation needs the output column; use predict for data without answers.")
        metrics = TokenMetrics()
        rows = np.arange(len(dataset))
        limit = getattr(self.model.config_obj.trainer, "eval_steps", None)
        if limit:  # Ludwig's cap on evaluation batches
            rows = rows[: int(limit) * self.batch_size]
        device = self.model.curr_device
        # Losses are summed over target tokens: batches may be as large as the memory allows, whatever the training's.
        tokens = pass_tokens(unwrapped(self.model.model), device)
        with self._evaluating(), torch.no_grad(), self._progress(_name("Evaluation", dataset_name), len(rows)) as bar:
            for adapter, group in groups(dataset.adapters, rows):
                by_length = group[np.argsort(-dataset.input_ids.lengths[group], kind="stable")]
                with using(self.model, adapter):
                    for batch in token_batches(dataset, by_length, tokens):
                        metrics.update(self.model(batch.to(device)))
                        bar(len(batch.rows))
        return metrics.compute(getattr(self.model.config_obj.trainer, "validation_metric", None))

    def scores(
        self, dataset: TokenDataset, rows: np.ndarray, answers: Sequence[Answer]
    ) -> tuple[dict[str, float], list[Example]]:
        """Return the configured metrics of the answers to `rows`, and a few of them to read."""
        settings = self.model.config_obj.evaluation
        texts = self.texts(answers)
        targets = texts_of(dataset, self.output_column, rows)
        chosen = spread_rows(len(rows), settings.examples)
        examples = make_examples(
            rows[chosen].tolist(),
            texts_of(dataset, self.input_column, rows[chosen]),
            [targets[place] for place in chosen],
            [texts[place] for place in chosen],
            settings.language,
        )
        return score_texts(texts, targets, settings.reported, settings.language), examples

    def batch_predict(self, dataset: TokenDataset, dataset_name: str | None = None, **_: Any) -> pd.DataFrame:
        """Return one row for each prompt, in the dataset's order: token ids and their probabilities."""
        return self._frame(self.generate(dataset, np.arange(len(dataset)), self.model.generation, dataset_name))

    def _frame(self, answers: Sequence[Answer]) -> pd.DataFrame:
        return pd.DataFrame(
            {
                f"{self.output_column}_{PREDICTIONS}": [answer.tokens for answer in answers],
                f"{self.output_column}_{PROBABILITIES}": [answer.probabilities for answer in answers],
            }
        )

    def predict_single(self, batch: Any) -> pd.DataFrame:
        """Predict one dataset at once; kept for Ludwig's interface."""
        return self.batch_predict(batch)

    def batch_collect_activations(self, layer_names: Any, dataset: Any, bucketing_field: Any = None) -> Any:
        """Refuse: a language model's activations are not collected by Ludwig's commands."""
        raise ModelError(
            "collect_activations is not available for model_type: llm. Export the model (export: [{format: merged}]) "
            "and use transformers with output_hidden_states=True."
        )

    def generate(
        self, dataset: TokenDataset, rows: np.ndarray, config: Any, dataset_name: str | None = None
    ) -> list[Answer]:
        """Return an answer for each of the given rows' prompts; how many are made at once is up to the memory."""
        prompts = [dataset.input_ids[int(row)][: int(dataset.prompt_lengths[row])] for row in rows]
        with self._evaluating(), self._progress(_name("Prediction", dataset_name), len(rows)) as bar:
            device = self.model.curr_device
            if dataset.adapters is not None:
                names = [dataset.adapters[row] for row in rows]
                return generate_by_adapter(self.model.model, prompts, names, config, device=device, progress=bar)
            tasks = None if dataset.tasks is None else np.asarray(dataset.tasks)[rows]
            return generate_answers(self.model.model, prompts, config, device=device, progress=bar, tasks=tasks)

    def texts(self, answers: Sequence[Answer]) -> list[str]:
        """Return answers as texts."""
        texts: list[str] = self.model.tokenizer.batch_decode(
            [answer.tokens for answer in answers], skip_special_tokens=True
        )
        return texts

    @property
    def input_column(self) -> str:
        """Name of the prompt's column."""
        return str(next(iter(self.model.input_features)))

    @property
    def output_column(self) -> str:
        """Name of the answer's column."""
        return str(next(iter(self.model.output_features)))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Switch dropout off, and back to what it was."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    @contextmanager
    def _progress(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        settings = {"desc": name, "total": total, "file": sys.stdout, "disable": is_progressbar_disabled()}
        bar = LudwigProgressBar(self.report_tqdm_to_ray, settings, self.distributed.rank() == 0)
        try:
            yield bar.update
        finally:
            bar.close()


def _name(task: str, dataset_name: str | None) -> str:
    """Return what a progress bar is called."""
    return f"{task} {dataset_name or '':<5.5}".strip()
