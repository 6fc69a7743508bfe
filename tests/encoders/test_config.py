"""Adapter sections of encoders: brought into one form, checked strictly, refused where they would have no effect."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ludwig.error import ConfigValidationError
from ludwig.schema.model_types.base import ModelConfig

# Ludwig warns about keys that it adds to encoder sections itself, and about those it does not know.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning")

BERT = {"type": "bert", "pretrained_model_name_or_path": "somewhere"}
LORA = {"type": "lora", "r": 4}


@pytest.fixture(autouse=True)
def _registered(registered: None) -> None:
    """The plugin is there."""


def config(encoder: Any = None, feature: Any = None, **top: Any) -> dict[str, Any]:
    text = {"name": "code", "type": "text", **({"encoder": encoder} if encoder is not None else {}), **(feature or {})}
    return {
        "input_features": [text, {"name": "lines", "type": "number"}],
        "output_features": [{"name": "area", "type": "category"}],
        **top,
    }


def encoder_of(given: dict[str, Any], index: int = 0) -> Any:
    return ModelConfig.from_dict(given).input_features[index].encoder


@pytest.mark.parametrize("adapter", ["lora", "LoRA", {"type": "lora"}, {"type": "LORA"}])
def test_an_adapter_is_trained_without_being_told(adapter: Any) -> None:
    encoder = encoder_of(config(BERT | {"adapter": adapter}))
    assert encoder.adapter.type == "lora"
    assert encoder.trainable is True
    assert not encoder.can_cache_embeddings()


def test_other_names_of_a_type_are_understood() -> None:
    assert encoder_of(config(BERT | {"adapter": "adapter"})).adapter.type == "bottleneck"


def test_an_encoder_without_an_adapter_stays_as_ludwig_has_it() -> None:
    given = config(BERT)
    before = copy.deepcopy(given)
    encoder = encoder_of(given)
    assert given == before
    assert encoder.trainable is False
    assert encoder.adapter is None


def test_defaults_reach_every_text_feature() -> None:
    given = config(defaults={"text": {"encoder": BERT | {"adapter": LORA}}})
    given["input_features"].append({"name": "title", "type": "text"})
    for index in (0, 2):
        encoder = encoder_of(given, index)
        assert (encoder.type, encoder.adapter.r, encoder.trainable) == ("bert", 4, True)


def test_a_saved_config_is_read_again() -> None:
    saved = ModelConfig.from_dict(config(BERT | {"adapter": LORA})).to_dict()
    again = ModelConfig.from_dict(saved).input_features[0].encoder
    assert (again.adapter.r, again.trainable) == (4, True)


def test_a_model_that_stock_ludwig_saved_with_a_frozen_adapter_is_read() -> None:
    saved = ModelConfig.from_dict(config(BERT | {"adapter": LORA})).to_dict()
    saved["input_features"][0]["encoder"]["trainable"] = False
    assert ModelConfig.from_dict(saved).input_features[0].encoder.trainable is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config(BERT | {"adapter": {"type": "lora", "rank": 4}}), r"encoder\.adapter\.rank: .*did you mean `r`"),
        (config(BERT | {"adapter": {"type": "lora", "r": 0}}), r"encoder\.adapter\.r: 0 is not allowed"),
        (config(BERT | {"adapter": {"type": "loar"}}), r"encoder\.adapter\.type: .*did you mean `lora`"),
        (config(BERT | {"adapter": {"r": 4}}), r"encoder\.adapter\.type: is missing"),
        (config(BERT | {"adapter": ["lora"]}), r"encoder\.adapter: .*give a mapping"),
        (config(BERT | {"adapter": "qlora"}), r"`qlora` needs a quantised base; use one of .*`lora`"),
        (config(BERT | {"adapter": "prefix_tuning"}), r"`prefix_tuning` does not fit a text encoder; use one of"),
        (config(BERT | {"adapter": "adalora"}, backend="ray"), r"adapter\.type: `adalora` works between .* local"),
        (
            config(BERT | {"adapter": "adalora"}, backend={"type": "ray"}),
            r"adapter\.type: `adalora` works between .* local",
        ),
        (config({"type": "parallel_cnn", "adapter": LORA}), r"cannot be applied to the encoder `parallel_cnn`"),
        (config({"adapter": LORA}), r"cannot be applied to the encoder `parallel_cnn`"),
        (config(BERT | {"adapter": LORA, "trainable": False}), r"encoder\.trainable: false would freeze the adapter"),
        (config(BERT | {"adapter": LORA, "use_pretrained": False}), r"use_pretrained: false leaves .* random weights"),
        (config(BERT | {"quantization": {"bits": 4}}), r"encoder\.quantization: has no effect .* `llm`"),
        (
            config(BERT | {"adapter": LORA, "pretrained_kwargs": {"load_in_8bit": True}}),
            r"pretrained_kwargs\.load_in_8bit: gives a quantised encoder",
        ),
        (
            config(BERT | {"adapter": LORA | {"init_lora_weights": "eva"}}),
            r"init_lora_weights: reads training rows, which are not there .* use `default`",
        ),
        (
            config(BERT | {"adapter": LORA | {"pretrained_adapter_weights": "folder", "init_lora_weights": "pissa"}}),
            r"init_lora_weights: has no effect: pretrained_adapter_weights gives the weights",
        ),
        (
            config(BERT | {"adapter": LORA | {"postprocessor": {"merge_adapter_into_base_model": True}}}),
            r"merge_adapter_into_base_model: has no effect in an encoder",
        ),
        (
            config(BERT | {"adapter": LORA}, {"preprocessing": {"cache_encoder_embeddings": True}}),
            r"input_features\[0\]\.preprocessing\.cache_encoder_embeddings: true needs an encoder that does not change",
        ),
        (config(BERT, adapter=LORA), r"Config error in adapter: has no effect with `model_type: ecd`"),
        (config(BERT, quantization={"bits": 4}), r"Config error in quantization: has no effect"),
        (
            config(defaults={"text": {"encoder": BERT | {"adapter": {"type": "lora", "alfa": 4}}}}),
            r"defaults\.text\.encoder\.adapter\.alfa: .*did you mean `alpha`",
        ),
        (
            config({"type": "llm", "base_model": "x", "adapter": LORA | {"init_lora_weights": "pissa"}}),
            r"init_lora_weights: changes the base's weights",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_take_effect_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigValidationError, match=message):
        ModelConfig.from_dict(given)


def test_every_mistake_is_listed_once() -> None:
    with pytest.raises(ConfigValidationError) as caught:
        ModelConfig.from_dict(config(BERT | {"adapter": LORA | {"x": 1}, "quantization": {"bits": 4}}, adapter=LORA))
    lines = str(caught.value).splitlines()
    assert lines[0] == "The config has 3 errors:"
    assert len(lines) == 4


def test_a_tied_feature_takes_its_partners_adapter() -> None:
    given = config(BERT | {"adapter": LORA})
    given["input_features"].append({"name": "b", "type": "text", "tied": "code", "encoder": BERT | {"adapter": "dora"}})
    with pytest.raises(ConfigValidationError, match=r"input_features\[2\]\.encoder\.adapter: .* that of `code`"):
        ModelConfig.from_dict(given)
    given["input_features"][2]["encoder"] = BERT | {"adapter": LORA}
    ModelConfig.from_dict(given)


def test_an_unknown_key_outside_the_adapter_stays_allowed() -> None:
    ModelConfig.from_dict(config(BERT | {"adapter": LORA, "no_option_of_ludwig": 1}))


def test_the_schema_of_ludwig_is_still_enforced() -> None:
    with pytest.raises(ConfigValidationError, match="Failed to validate JSON schema"):
        ModelConfig.from_dict(config(BERT, trainer={"epochs": "many"}))


def test_a_quantised_llm_encoder_takes_qlora() -> None:
    from ludwig_peft_plugin.encoders.config import check_encoders, normalized

    given = normalized(config({"type": "llm", "base_model": "x", "adapter": "qlora"}))
    assert given["input_features"][0]["encoder"]["quantization"]["bits"] == 4
    check_encoders(given)


def test_other_model_types_are_left_alone() -> None:
    from ludwig_peft_plugin.encoders.config import normalized

    given = {"model_type": "llm", "input_features": [{"name": "a", "type": "text", "encoder": {"adapter": "lora"}}]}
    assert normalized(given) is given
