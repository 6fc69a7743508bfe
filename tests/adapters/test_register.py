"""Registration: one door, no silent replacement, aliases, and a third party's adapter through the same line."""

from typing import Any, ClassVar

import pytest
from ludwig.error import ConfigValidationError
from ludwig.schema import utils as schema_utils
from ludwig.schema.llms.peft import BaseAdapterConfig, adapter_registry, get_adapter_conds

from ludwig_peft_plugin.adapters.base import AdapterConfig, register
from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.adapters.methods.qlora import QLoraConfig


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a test registers."""
    monkeypatch.setattr(adapter_registry, "data", dict(adapter_registry.data))


def third_party() -> type[AdapterConfig]:
    class ThirdParty(AdapterConfig):
        mergeable: ClassVar[bool] = True
        aliases: ClassVar[tuple[str, ...]] = ("third", "3rd")

        type: str = schema_utils.ProtectedString("third_party")
        r: int = schema_utils.PositiveInteger(default=3, description="Rank.")

        def to_config(self, task_type: str | None = None, **kwargs: Any) -> Any:
            from peft import LoraConfig as PeftLoraConfig

            return PeftLoraConfig(r=self.r, target_modules=["o_proj"], task_type=task_type)

    return ThirdParty


def test_built_in_types_are_registered_and_lora_takes_the_place_of_ludwigs() -> None:
    assert adapter_registry["lora"] is LoraConfig
    assert adapter_registry["qlora"] is QLoraConfig
    assert adapter_registry["dora"] is DoraConfig


def test_one_line_registers_a_third_party_and_it_trains(tiny: Any) -> None:
    cls = register("third_party")(third_party())

    assert adapter_registry["third_party"] is cls
    assert "third_party" in [cond["if"]["properties"]["type"]["const"] for cond in get_adapter_conds()]
    layers = tiny.layers_of(tiny.attach(cls(r=5)))
    assert {name.rsplit(".", 1)[-1] for name in layers} == {"o_proj"}
    assert all(layer.r["default"] == 5 for layer in layers.values())


def test_a_taken_name_is_refused_with_both_sides() -> None:
    with pytest.raises(ConfigValidationError, match=r"'dora'.*ThirdParty.*DoraConfig"):
        register("dora")(third_party())
    assert adapter_registry["dora"] is DoraConfig


def test_ludwigs_own_types_are_not_replaced_silently() -> None:
    with pytest.raises(ConfigValidationError, match="'ia3'"):
        register("ia3")(third_party())


def test_an_alias_cannot_be_taken_twice() -> None:
    register("third_party")(third_party())

    class Other(third_party()):  # type: ignore[misc]
        aliases: ClassVar[tuple[str, ...]] = ("third",)

    with pytest.raises(ConfigValidationError, match="'third'"):
        register("other")(Other)
    with pytest.raises(ConfigValidationError, match="'third'"):
        register("third")(Other)
    assert "other" not in adapter_registry


def test_replacing_is_explicit_and_needs_something_to_replace() -> None:
    cls = third_party()
    assert register("dora", replace=True)(cls) is cls
    assert adapter_registry["dora"] is cls
    with pytest.raises(ConfigValidationError, match="no such type"):
        register("unheard_of", replace=True)(third_party())


def test_names_are_lower_case() -> None:
    with pytest.raises(ConfigValidationError, match="'thirdparty'"):
        register("ThirdParty")(third_party())


def test_registering_a_class_again_is_no_conflict() -> None:
    assert register("dora")(DoraConfig) is DoraConfig


def test_capabilities_are_on_the_class() -> None:
    assert all(cls.quantized_base and cls.mergeable for cls in (LoraConfig, QLoraConfig, DoraConfig))
    assert not any(cls.soft_prompt for cls in (LoraConfig, QLoraConfig, DoraConfig))
    assert QLoraConfig.default_quantization is not None
    assert QLoraConfig.default_quantization["bits"] == 4
    assert LoraConfig.default_quantization is None
    assert DoraConfig.default_quantization is None
    assert not AdapterConfig.quantized_base
    assert issubclass(LoraConfig, BaseAdapterConfig)


def test_every_type_has_a_name_and_a_description() -> None:
    for cls in (LoraConfig, QLoraConfig, DoraConfig):
        assert cls.name()
        assert len(cls.description()) > 40
