"""Adapters of language models. Importing this package registers the types in `methods` with Ludwig."""

import importlib
import pkgutil

from ludwig_peft_plugin.adapters import methods
from ludwig_peft_plugin.adapters.peft_registry import register_remaining

for _module in sorted(module.name for module in pkgutil.iter_modules(methods.__path__)):
    importlib.import_module(f"{methods.__name__}.{_module}")
register_remaining()
