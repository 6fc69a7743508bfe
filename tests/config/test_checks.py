"""Ludwig's two checks of quantised fine-tuning are replaced by ones that ask the adapter's class."""

from typing import Any

import pytest

from ludwig_peft_plugin._replace import LudwigChangedError
from ludwig_peft_plugin.config import checks


def test_replaced_by_name_in_place() -> None:
    def check_other(config: Any) -> None: ...

    def check_qlora_requirements(config: Any) -> None: ...

    def check_qlora_merge_and_unload_compatibility(config: Any) -> None: ...

    registry = [check_qlora_requirements, check_other, check_qlora_merge_and_unload_compatibility]
    checks.install_checks(registry)
    expected = [checks.check_qlora_requirements, check_other, checks.check_qlora_merge_and_unload_compatibility]
    assert registry == expected
    checks.install_checks(registry)
    assert registry == expected


def test_missing_check_is_an_error_and_nothing_is_replaced() -> None:
    def check_qlora_requirements(config: Any) -> None: ...

    registry = [check_qlora_requirements]
    with pytest.raises(LudwigChangedError, match="check_qlora_merge_and_unload_compatibility"):
        checks.install_checks(registry)
    assert registry == [check_qlora_requirements]


def test_ludwig_has_the_checks() -> None:
    from ludwig.config_validation.checks import get_config_check_registry

    installed = get_config_check_registry()._registry
    assert checks.check_qlora_requirements in installed
    assert checks.check_qlora_merge_and_unload_compatibility in installed


@pytest.mark.parametrize(
    ("adapter", "message"),
    [("frod", "adapter type `frod` cannot be trained on a quantised base"), (None, "add `adapter: qlora`")],
)
def test_object_that_cannot_be_trained_quantised(load: Any, adapter: str | None, message: str) -> None:
    from ludwig.error import ConfigValidationError

    config = load(adapter=adapter)
    config.quantization = load(quantization={"bits": 4}).quantization
    with pytest.raises(ConfigValidationError, match=message):
        checks.check_qlora_requirements(config)


def test_object_that_cannot_be_merged(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ludwig.error import ConfigValidationError
    from ludwig.schema.llms.peft import adapter_registry

    config = load(adapter={"type": "dora", "postprocessor": {"merge_adapter_into_base_model": True}})
    checks.check_qlora_merge_and_unload_compatibility(config)
    monkeypatch.setattr(adapter_registry["dora"], "mergeable", False)
    with pytest.raises(ConfigValidationError, match="`dora` cannot be merged"):
        checks.check_qlora_merge_and_unload_compatibility(config)


def test_named_models_are_found_by_ludwigs_architecture_checks() -> None:
    from ludwig_peft_plugin.config.base_model import adapter_check_model_config

    assert adapter_check_model_config("tiny-llama-python").model_type == "llama"
