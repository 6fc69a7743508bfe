"""`LudwigModel.evaluate` with the generated answers written beside its statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ludwig_peft_plugin.adapters.several.active import chosen_adapter
from ludwig_peft_plugin.adapters.several.mixed import using
from ludwig_peft_plugin.evaluation.examples import write_examples


def evaluate_and_write(original: Callable[..., Any], ludwig_model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call Ludwig's `evaluate`; where it saves statistics, save the examples of the answers in the same folder.

    Returns:
        What Ludwig's method returns: statistics, predictions and the folder.
    """
    arguments = inspect.signature(original).bind(ludwig_model, *args, **kwargs)
    arguments.apply_defaults()
    ludwig_model.model.examples = []
    with using(ludwig_model, chosen_adapter()):
        result = original(*arguments.args, **arguments.kwargs)
    if ludwig_model.model.examples and not arguments.arguments["skip_save_eval_stats"]:
        write_examples(result[2], ludwig_model.model.examples)
    return result
