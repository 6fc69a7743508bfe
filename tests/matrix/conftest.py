"""The matrix: which adapter types meet which bases, and the cells as fixtures."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ludwig.schema.llms.peft import adapter_registry
from ludwig.schema.utils import unload_jsonschema_from_config_class

import ludwig_peft_plugin.adapters  # noqa: F401 (registers the types)
from ludwig_peft_plugin.adapters.lora_fields import SECTIONS


def _sibling(name: str) -> ModuleType:
    """Import a module that lies beside this one."""
    spec = importlib.util.spec_from_file_location(f"adapter_matrix_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


bases_module, expected_module, case_module = _sibling("bases"), _sibling("expected"), _sibling("case")
alternatives_module, fingerprint_module, run_module = _sibling("alternatives"), _sibling("fingerprint"), _sibling("run")
TRAINED = [(kind, base) for kind, expected in expected_module.TYPES.items() for base in expected.bases]
REFUSED = [(kind, base) for kind, expected in expected_module.TYPES.items() for base in expected.refused]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with a `case` on every cell that trains, one with a `refused` case on every other."""
    for fixture, cells in (("case", TRAINED), ("refused", REFUSED)):
        if fixture in metafunc.fixturenames:
            names = [f"{kind}-{base}" for kind, base in cells]
            metafunc.parametrize(fixture, cells, indirect=True, scope="module", ids=names)
    if "option" in metafunc.fixturenames:
        pairs = [pair for pair in declared_options() if pair[1] not in ELSEWHERE]
        metafunc.parametrize("option", pairs, indirect=True, ids=[".".join(pair) for pair in pairs])


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bases_module.Bases(tmp_path_factory.mktemp("matrix"))


def _case(kind: str, base: str, bases: Any) -> Any:
    precision = bases_module.PRECISIONS[bases_module.BASES[base]]
    return case_module.Case(kind, base, expected_module.TYPES[kind], precision, bases, run_module.Run)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, bases: Any) -> Any:
    return _case(*request.param, bases)


@pytest.fixture(scope="module")
def refused(request: pytest.FixtureRequest, bases: Any) -> Any:
    return _case(*request.param, bases)


@pytest.fixture(scope="session")
def cells() -> Any:
    """What there is to run: the types expected, the bases, and the cells that train and that are refused."""
    return {
        "types": set(expected_module.TYPES),
        "bases": list(bases_module.BASES),
        "trained": TRAINED,
        "refused": REFUSED,
    }


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are much faster on one thread; bitsandbytes' remark about each 8-bit product is left out."""
    threads, level = torch.get_num_threads(), logging.getLogger("bitsandbytes").level
    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)
    logging.getLogger("bitsandbytes").setLevel(level)


@pytest.fixture(scope="session")
def find_problems(registered: None) -> Any:
    """Return a function that returns what the plugin's check of a whole config says about a case."""
    from ludwig_peft_plugin.config.strict import find_problems

    def find(case: Any) -> list[str]:
        config: dict[str, Any] = {
            "model_type": "llm",
            "base_model": "tiny-llama-python",
            "input_features": [{"name": "prompt", "type": "text"}],
            "output_features": [{"name": "output", "type": "text"}],
            "adapter": {"type": case.kind, **case.options},
            "trainer": {"type": "finetune"},
        }
        if case.precision.section is not None:
            config["quantization"] = case.precision.section
        return [f"{problem.path}: {problem.message}" for problem in find_problems(config)]

    return find


# ---- options ---------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "type": "chooses the class",
    "postprocessor": "read by the trainer once training is over, and tested there",
    "pretrained_adapter_weights": "test_saving.py",
    "loraplus_lr_ratio": "acts on the optimiser: tests/adapters/test_option_effect.py",
    "ephemeral_gpu_offload": "needs a GPU: tests/adapters/test_option_effect.py",
    **dict.fromkeys(SECTIONS.values(), "tests/adapters/test_section_effect.py"),
    "task_column": "read with the dataset: tests/data/test_tasks.py, tests/integration/test_soft_prompts.py",
    "tasks": "read with the dataset: tests/data/test_tasks.py",
    "source": "needs a trained adapter: tests/adapters/test_soft_prompts.py",
    "source_task": "needs a trained adapter: tests/adapters/test_soft_prompts.py",
}
"""Options that are tested in another place."""


def declared_options() -> list[tuple[str, str]]:
    """Return every option of the types whose options are tried."""
    known = [kind for kind in expected_module.TYPES if kind in adapter_registry]
    known = [kind for kind in known if kind not in alternatives_module.NOT_YET]
    return [(kind, name) for kind in known for name in adapter_registry[kind].model_fields]


_baselines: dict[tuple[str, str, str], Any] = {}


class Tried:
    """An option of a type, and the adapters that have it at its default and at another value."""

    def __init__(self, kind: str, name: str, case: Any) -> None:
        self.kind, self.name, self._case = kind, name, case
        self._needs = alternatives_module.listed(alternatives_module.NEEDS, kind, name, {})
        self._along = alternatives_module.listed(alternatives_module.ALONG, kind, name, {})
        self.refused_alone = alternatives_module.listed(alternatives_module.REFUSED, kind, name, None) is not None

    def values(self) -> list[Any]:
        """Return the values to try."""
        schema = unload_jsonschema_from_config_class(adapter_registry[self.kind])["properties"][self.name]
        default = self._case.options.get(self.name, schema.get("default"))
        return list(alternatives_module.alternatives(self.kind, self.name, {**schema, "default": default}))

    def baseline(self) -> Any:
        """Return what is observed at the option's default; the same for all options that need the same."""
        key = (self.kind, self._case.base_name, repr(self._needs))
        if key not in _baselines:
            _baselines[key] = fingerprint_module.Fingerprint(self._case, self._needs)
        return _baselines[key]

    def with_value(self, value: Any) -> Any:
        """Return what is observed at another value."""
        return fingerprint_module.Fingerprint(self._case, {**self._needs, **self._along, self.name: value})


@pytest.fixture
def option(request: pytest.FixtureRequest, bases: Any) -> Tried:
    kind, name = request.param
    table = alternatives_module
    case = _case(kind, table.listed(table.BASES, kind, name, "qwen2-fp32"), bases)
    return Tried(kind, name, case)


@pytest.fixture
def options_tried() -> tuple[set[Any], set[Any], int]:
    """Every option that is tried here, the types left out, and how many options there are to try."""
    tried = {pair for pair in declared_options() if pair[1] not in ELSEWHERE}
    return tried, set(alternatives_module.NOT_YET), alternatives_module.COUNT


@pytest.fixture
def make_case(bases: Any) -> Any:
    """Return a function that makes the case of a type and a base."""
    return lambda kind, base: _case(kind, base, bases)


@pytest.fixture
def make_fingerprint() -> Any:
    """Return a function that observes an adapter."""
    return fingerprint_module.Fingerprint
