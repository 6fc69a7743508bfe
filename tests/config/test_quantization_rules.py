"""The `quantization` section: what can be trained on what, and options that the other backend reads."""

from __future__ import annotations

from typing import Any

import pytest

FLOAT8 = {"backend": "torchao", "mode": "float8"}
INT8 = {"backend": "torchao", "mode": "int8_weight_only"}
CATEGORY = [
    {
        "name": "label",
        "type": "category",
        "preprocessing": {"fallback_label": "no"},
        "decoder": {"type": "category_extractor", "match": {"yes": {"type": "contains", "value": "y"}}},
    }
]

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"quantization": {"backend": "torchao"}}, "quantization.mode", "give one of `float8`, `int8_weight_only`"),
    ({"quantization": {**FLOAT8, "mode": "int4_weight_only"}}, "quantization.mode", "bits: 4 (adapter type `qlora`"),
    ({"quantization": {**FLOAT8, "mode": "int8_dynamic"}}, "quantization.mode", "use `float8`"),
    ({"quantization": {**FLOAT8, "mode": "float4"}}, "quantization.mode", "`int8_weight_only`"),
    ({"quantization": {**FLOAT8, "qat": True}}, "quantization.qat", "train the adapter on the quantised base"),
    ({"quantization": {**FLOAT8, "bits": 8}}, "quantization.bits", "read by backend `bitsandbytes` alone"),
    ({"quantization": {**INT8, "llm_int8_threshold": 1.0}}, "quantization.llm_int8_threshold", "remove it"),
    ({"quantization": {**INT8, "bnb_4bit_quant_type": "fp4"}}, "quantization.bnb_4bit_quant_type", "remove it"),
    (
        {"quantization": {**FLOAT8, "bnb_4bit_compute_dtype": "float16"}},
        "quantization.bnb_4bit_compute_dtype",
        "remove it",
    ),
    (
        {"quantization": {**INT8, "float8_transposed_copy": False}},
        "quantization.float8_transposed_copy",
        "read by mode `float8` alone",
    ),
    (
        {"quantization": {"bits": 4, "float8_transposed_copy": False}},
        "quantization.float8_transposed_copy",
        "read by backend `torchao` with mode `float8` alone",
    ),
    ({"quantization": FLOAT8, "adapter": ...}, "quantization", "add `adapter: lora`"),
    ({"quantization": FLOAT8, "adapter": "frod"}, "adapter.type", "use one of `adalora`"),
    ({"quantization": {"bits": 4}, "adapter": "frod"}, "adapter.type", "because it keeps a factor of every weight"),
    (
        {"quantization": FLOAT8, "output_features": CATEGORY, "prompt": {"task": "Say what it is."}},
        "quantization.backend",
        "for models that answer in text",
    ),
]


@pytest.mark.parametrize(("sections", "path", "text"), WRONG)
def test_what_cannot_work(errors: Any, sections: dict[str, Any], path: str, text: str) -> None:
    found = errors(**sections)
    assert list(found) == [path]
    assert text in found[path]


@pytest.mark.parametrize("quantization", [FLOAT8, INT8, {**FLOAT8, "float8_transposed_copy": False}])
@pytest.mark.parametrize("adapter", ["lora", "qlora", "dora", "ia3", "loha", "oft", "vera"])
def test_adapters_on_8_bit_rows(errors: Any, adapter: str, quantization: dict[str, Any]) -> None:
    assert errors(adapter=adapter, quantization=quantization, export=["adapter", "merged"]) == {}


def test_prediction_alone(errors: Any) -> None:
    assert errors(quantization=FLOAT8, adapter=..., trainer=...) == {}


@pytest.mark.parametrize("quantization", [FLOAT8, INT8])
def test_config_object_passes_ludwigs_checks_and_is_saved(load: Any, errors: Any, quantization: dict[str, Any]) -> None:
    config = load(quantization=quantization, adapter="ia3")
    assert config.quantization.float8_transposed_copy
    saved = config.to_dict()["quantization"]
    assert saved.items() >= quantization.items()
    assert errors(quantization=saved, adapter="ia3") == {}
    assert load(quantization=saved, adapter="ia3").quantization.mode == quantization["mode"]


@pytest.mark.parametrize(
    ("quantization", "adapter", "message"),
    [
        (FLOAT8, "frod", "adapter type `frod` cannot be trained on a quantised base"),
        (INT8, None, "add `adapter: lora`"),
    ],
)
def test_config_object_that_cannot_be_trained(
    load: Any, quantization: dict[str, Any], adapter: str | None, message: str
) -> None:
    from ludwig.error import ConfigValidationError

    from ludwig_peft_plugin.config.checks import check_qlora_requirements

    config = load(adapter=adapter)
    config.quantization = load(quantization=quantization).quantization
    with pytest.raises(ConfigValidationError, match=message):
        check_qlora_requirements(config)
