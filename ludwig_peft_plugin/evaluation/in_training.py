"""What is evaluated while training: always the loss and a few answers to read, all answers' scores when asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ludwig_peft_plugin.evaluation.examples import (
    Example,
    as_ludwig_keeps_them,
    make_examples,
    texts_of,
    write_examples,
)
from ludwig_peft_plugin.model.generation import generation_settings

if TYPE_CHECKING:
    from ludwig_peft_plugin.data.token_dataset import TokenDataset
    from ludwig_peft_plugin.evaluation.predictor import PeftPredictor

logger = logging.getLogger(__name__)

EXAMPLES = 3
EXAMPLE_TOKENS = 64
FOLDER = "llm_eval_examples"  # Ludwig's, in the model's folder
TRAIN, VALIDATION = "train", "validation"  # Ludwig's trainer's names of the sets


def evaluate(
    predictor: PeftPredictor, dataset: TokenDataset, dataset_name: str, tracker: Any, folder: str | None
) -> dict[str, dict[str, float]]:
    """Return the metrics on one of the sets in Ludwig's form, and keep the examples made on the way.

    With `evaluation.during_training` answers to the validation and test set are generated as in `ludwig predict` and
    scored; without it there are a few short ones of the validation set, to read.

    Args:
        predictor: runs the model.
        dataset: the set.
        dataset_name: Ludwig's trainer's name of it: train, validation or test.
        tracker: Ludwig's progress tracker, which gets the validation set's examples for its CSV file and callbacks.
        folder: the folder of the model that is trained, for `llm_eval_examples/<set>_step_<n>`; None writes nothing.
    """
    values = predictor.losses(dataset, dataset_name)
    settings = predictor.model.config_obj.evaluation
    examples: list[Example] = []
    if settings.during_training and dataset_name != TRAIN:
        rows = np.arange(len(dataset))[: settings.rows]
        answers = predictor.generate(dataset, rows, predictor.model.generation, dataset_name)
        scores, examples = predictor.scores(dataset, rows, answers)
        values |= scores
    elif dataset_name == VALIDATION:
        examples = short_examples(predictor, dataset)
    if dataset_name == VALIDATION:
        tracker.llm_eval_examples = as_ludwig_keeps_them(examples)
        for example in examples[:EXAMPLES]:
            logger.info("Prompt: %s\nTarget: %s\nAnswer: %s\n---", *(text.strip() for text in example.texts))
    if examples and folder is not None:
        write_examples(Path(folder, FOLDER), examples, f"{dataset_name}_step_{tracker.steps}")
    return predictor.model.named_metrics(values)


def short_examples(
    predictor: PeftPredictor, dataset: TokenDataset, count: int = EXAMPLES, max_new_tokens: int = EXAMPLE_TOKENS
) -> list[Example]:
    """Return the first `count` rows with greedy answers of at most `max_new_tokens` tokens."""
    rows = np.arange(min(count, len(dataset)))
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "use_cache": True}
    config = generation_settings(settings, predictor.model.tokenizer, predictor.model.model)
    answers = predictor.generate(dataset, rows, config, VALIDATION)
    return make_examples(
        rows.tolist(),
        texts_of(dataset, predictor.input_column, rows),
        texts_of(dataset, predictor.output_column, rows),
        predictor.texts(answers),
        predictor.model.config_obj.evaluation.language,
    )
