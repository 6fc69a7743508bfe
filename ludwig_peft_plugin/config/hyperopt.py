"""The `hyperopt` section: Ludwig's, with both of its executors; Ludwig's own schema knows the one on Ray alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ludwig.schema import utils as schema_utils
from ludwig.schema.hyperopt import HyperoptConfig
from ludwig.schema.hyperopt.executor import ExecutorConfig

from ludwig_peft_plugin.config.fields import SelectionField
from ludwig_peft_plugin.config.problems import Problem
from ludwig_peft_plugin.config.raw import section

OF_RAY = (
    "time_budget_s",
    "cpu_resources_per_trial",
    "gpu_resources_per_trial",
    "kubernetes_namespace",
    "scheduler",
)
"""Options of the executor that mean something on Ray alone, without those that Ludwig fills in for every executor."""


class OptunaExecutorConfig(ExecutorConfig):
    """Trials one after the other in this process, chosen by Optuna."""

    type: str = schema_utils.ProtectedString("optuna", description="Optuna, in this process.")
    num_samples: int | None = schema_utils.PositiveInteger(
        default=10, allow_none=True, description="How many trials there are."
    )
    sampler: str = schema_utils.StringOptions(
        options=["auto", "tpe", "gp", "cmaes", "random"],
        default="auto",
        description="How Optuna chooses the next trial; `auto` is Optuna's own choice, or TPE.",
    )
    pruner: str | None = schema_utils.StringOptions(
        options=["median", "hyperband"],
        default=None,
        allow_none=True,
        description="Optuna's pruner of the study. Null is none.",
    )
    study_name: str | None = schema_utils.String(
        default=None, allow_none=True, description="The name of the study in `storage`. Null is `ludwig_hyperopt`."
    )
    storage: str | None = schema_utils.String(
        default=None,
        allow_none=True,
        description="Optuna's database, as `sqlite:///study.db`; a study in it goes on. Null keeps it in memory.",
    )


EXECUTORS: dict[str, type[ExecutorConfig]] = {"ray": ExecutorConfig, "optuna": OptunaExecutorConfig}


class _Executors(schema_utils.TypeSelection):
    def __init__(self) -> None:
        super().__init__(registry=EXECUTORS, default_value="ray", description="Where trials run, and how many.")

    def get_schema_from_registry(self, key: str) -> type[ExecutorConfig]:
        return EXECUTORS[key]

    def _jsonschema_type_mapping(self) -> dict[str, Any]:
        return {"oneOf": [schema_utils.unload_jsonschema_from_config_class(cls) for cls in EXECUTORS.values()]}


class HyperoptSection(HyperoptConfig):
    """A search for the best options."""

    executor: Any = SelectionField(
        "hyperopt.executor", _Executors(), "Where trials run, and how many."
    ).get_default_field()


def keep_executor(upgrade: Callable[[Any], Any], config: Any) -> Any:
    """Return an upgraded config with the executor it named, in the place of which Ludwig puts `ray`."""
    given = section(config, "hyperopt") if isinstance(config, dict) else {}
    named = section(given, "executor").get("type")
    if named not in EXECUTORS:
        return upgrade(config)
    executor = {**given["executor"], "type": "ray"}
    # What Ludwig fills in, with a warning that it will not for ever.
    search = {"search_alg": {"type": "variant_generator"}, **given}
    upgraded = upgrade({**config, "hyperopt": {**search, "executor": executor}})
    upgraded["hyperopt"]["executor"]["type"] = named
    return upgraded


def hyperopt_problems(config: dict[str, Any]) -> Iterator[Problem]:
    """Yield options of the search that would have no effect."""
    executor = section(section(config, "hyperopt"), "executor")
    if executor.get("type") != "optuna":
        return
    defaults = OptunaExecutorConfig().to_dict()
    for name in OF_RAY:
        if name in executor and executor[name] != defaults.get(name):
            yield Problem(f"hyperopt.executor.{name}", "is of executor `ray`, not of `optuna`; remove it")


def trial_config(merged: dict[str, Any], config: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the config of one trial of a search over adapters.

    Ludwig merges what was drawn into the config, so that options of the config's adapter type would stay beside those
    of another type. Here a drawn section with a `type` takes the place of the whole section, and of options drawn by
    themselves those are left out that the drawn type does not have.

    Args:
        merged: the config as Ludwig has merged it.
        config: the config of the search.
        parameters: what was drawn, by the names in `hyperopt.parameters`.
    """
    from ludwig_peft_plugin.config.adapter_types import adapter_class

    nested: dict[str, Any] = parameters.get(".") or {}
    drawn = {**nested, **{name: value for name, value in parameters.items() if name != "."}}
    result = {name: value for name, value in merged.items() if name != "hyperopt"}
    if not any(name == "adapter" or name.startswith("adapter.") for name in drawn):
        return result
    base = config.get("adapter")
    base = {"type": base} if isinstance(base, str) else dict(base or {})
    adapter = drawn.get("adapter", {})
    adapter = {"type": adapter} if isinstance(adapter, str) else dict(adapter or {})
    kind = adapter.get("type") or drawn.get("adapter.type") or base.get("type")
    if "adapter" in drawn and drawn["adapter"] is None:
        result.pop("adapter", None)
        return result
    start = adapter if adapter.get("type") else {**(base if kind == base.get("type") else {}), **adapter}
    cls = adapter_class(str(kind))
    single = {name.removeprefix("adapter."): value for name, value in drawn.items() if name.startswith("adapter.")}
    known = set(cls.model_fields) if cls is not None else set(single)
    fitting = {name: value for name, value in single.items() if name.split(".")[0] in known}
    result["adapter"] = {**start, **fitting, "type": kind}
    return result
