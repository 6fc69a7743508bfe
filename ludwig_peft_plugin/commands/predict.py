"""`ludwig-peft predict` and `evaluate`: Ludwig's commands, with an adapter chosen by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence


def run_ludwig(command: str, adapter: str | None, arguments: Sequence[str]) -> None:
    """Run `ludwig predict` or `ludwig evaluate` in this process.

    Args:
        command: `predict` or `evaluate`.
        adapter: the adapter that answers, "base" for none; None leaves the model's active one.
        arguments: Ludwig's own arguments.

    Raises:
        AdapterError: the model has no such adapter.
        SystemExit: Ludwig refuses the arguments.
    """
    from ludwig_peft_plugin.register import register

    register()
    from ludwig_peft_plugin.adapters.several.active import choose_adapter

    with choose_adapter(adapter):
        importlib.import_module(f"ludwig.{command}").cli(list(arguments))
