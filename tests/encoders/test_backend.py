"""Adapters of encoders on a backend that is given beside the config: the same is refused as in the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ludwig.backend
import pytest
import yaml
from ludwig.api import LudwigModel
from ludwig.backend.base import LocalBackend
from ludwig.error import ConfigValidationError

# Ludwig warns about keys that it adds to encoder sections itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning")

Make = Callable[..., dict[str, Any]]


class RayStandIn(LocalBackend):
    """Says that it is Ludwig's backend of Ray, which needs Ray to be imported."""

    BACKEND_TYPE = "ray"


@pytest.fixture
def make(make_config: Make) -> Make:
    """Return a function that makes a config which names no backend."""

    def without_backend(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = make_config(*args, **kwargs)
        del config["backend"]
        return config

    return without_backend


def refusal(config: dict[str, Any], **arguments: Any) -> str:
    with pytest.raises(ConfigValidationError) as caught:
        LudwigModel(config, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["adalora", "adamss"])
def test_ray_as_an_argument_is_refused_as_in_the_config(kind: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make({"type": kind})
    monkeypatch.setitem(ludwig.backend.backend_registry, "ray", RayStandIn)
    message = refusal(config, backend=RayStandIn())
    assert f"input_features[0].encoder.adapter.type: `{kind}` works between optimiser steps" in message
    assert "`backend: local`" in message
    assert message == refusal(config, backend="ray")
    assert message == refusal({**config, "backend": {"type": "ray"}})


def test_an_adapter_of_the_defaults_is_found(make: Make) -> None:
    config = make()
    encoder = config["input_features"][0].pop("encoder")
    config["defaults"] = {"text": {"encoder": {**encoder, "adapter": "adalora"}}}
    message = refusal(config, backend=RayStandIn())
    assert "input_features[0].encoder.adapter.type: `adalora`" in message
    assert message == refusal({**config, "backend": "ray"})


def test_the_command_refuses_it(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ludwig.train

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make({"type": "adalora"})))
    monkeypatch.setitem(ludwig.backend.backend_registry, "ray", RayStandIn)
    arguments = ["--config", str(path), "--dataset", str(tmp_path / "none.csv"), "--backend", "ray"]
    with pytest.raises(ConfigValidationError, match="`adalora` works between optimiser steps"):
        ludwig.train.cli([*arguments, "--output_directory", str(tmp_path)])


def test_what_needs_no_steps_of_its_own_and_what_is_trained_already_pass(make: Make) -> None:
    LudwigModel(make({"type": "lora"}), backend=RayStandIn())
    LudwigModel(make(), backend=RayStandIn())
    trained = LudwigModel(make({"type": "adalora"}), backend="local")
    again = LudwigModel(trained.config, backend=RayStandIn())
    assert again.config_obj.input_features[0].encoder.adapter.type == "adalora"
