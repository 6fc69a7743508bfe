"""Every option of the nested sections (eva_config and so on) changes something observable, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from ludwig_peft_plugin.adapters.lora_fields import SECTIONS
from ludwig_peft_plugin.adapters.methods.dora import DoraConfig
from ludwig_peft_plugin.adapters.methods.lora import LoraConfig
from ludwig_peft_plugin.adapters.methods.qlora import QLoraConfig
from ludwig_peft_plugin.errors import AdapterError

ALL = (LoraConfig, QLoraConfig, DoraConfig)
Case = Callable[[Any, Any], None]
cases: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def note(function: Case) -> Case:
        cases[name] = function
        return function

    return note


def built(tiny: Any, cls: Any, init: str, **options: Any) -> Any:
    """Return a model whose initialisation has these options."""
    settings = {SECTIONS[init]: options} if options else {}
    return tiny.attach(cls(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=init, **settings))


def ranks(tiny: Any, model: Any) -> set[int]:
    return {a.shape[0] for a, _ in tiny.factors(model).values()}


def scalings(tiny: Any, model: Any) -> set[float]:
    return {layer.scaling["default"] for layer in tiny.layers_of(model).values()}


@case("eva_config.rho")
def _(tiny: Any, cls: Any) -> None:
    assert ranks(tiny, built(tiny, cls, "eva", rho=1.0)) == {4}
    assert ranks(tiny, built(tiny, cls, "eva", rho=2.0)) != {4}


@case("eva_config.tau")
def _(tiny: Any, cls: Any) -> None:
    options = {"r": 2, "target_modules": ["o_proj"], "init_lora_weights": "eva"}
    patient, hasty = (
        tiny.attach(cls(**options, eva_config={"rho": 1.0, "tau": tau}), batches=2) for tau in (0.95, 0.0)
    )
    assert tiny.differ(patient, hasty)


@case("eva_config.use_label_mask")
def _(tiny: Any, cls: Any) -> None:
    targets, everything = (built(tiny, cls, "eva", rho=1.0, use_label_mask=value) for value in (True, False))
    assert tiny.differ(targets, everything)


@case("eva_config.label_mask_value")
def _(tiny: Any, cls: Any) -> None:
    unmasked = built(tiny, cls, "eva", rho=1.0, label_mask_value=-1)
    assert not tiny.differ(unmasked, built(tiny, cls, "eva", rho=1.0, use_label_mask=False))
    assert tiny.differ(unmasked, built(tiny, cls, "eva", rho=1.0))


@case("eva_config.whiten")
def _(tiny: Any, cls: Any) -> None:
    def norms(whiten: bool) -> set[float]:
        model = built(tiny, cls, "eva", rho=1.0, whiten=whiten)
        return {round(float(row.norm()), 3) for a, _ in tiny.factors(model).values() for row in a}

    assert norms(False) == {1.0}
    assert 1.0 not in norms(True)


@case("eva_config.adjust_scaling_factors")
def _(tiny: Any, cls: Any) -> None:
    assert scalings(tiny, built(tiny, cls, "eva", adjust_scaling_factors=True)) == {2.0}
    assert len(scalings(tiny, built(tiny, cls, "eva", adjust_scaling_factors=False))) > 1


@case("corda_config.corda_method")
def _(tiny: Any, cls: Any) -> None:
    size = {
        name: sum(float((b @ a).norm()) for a, b in tiny.factors(built(tiny, cls, "corda", corda_method=name)).values())
        for name in ("ipm", "kpm")
    }
    assert size["ipm"] > size["kpm"] > 0


@case("loftq_config.loftq_bits")
def _(tiny: Any, cls: Any) -> None:
    options = {"r": 4, "init_lora_weights": "loftq"}
    for bits, other in ((4, 8), (8, 4)):
        fitting = tiny.attach(cls(**options, loftq_config={"loftq_bits": bits}), tiny.base(bits=bits))
        assert tiny.differ(fitting, tiny.attach(cls(r=4), tiny.base(bits=bits)))
        with pytest.raises(AdapterError, match=f"loftq_bits: {other}, but the base is quantised to {bits} bits"):
            tiny.attach(cls(**options, loftq_config={"loftq_bits": other}), tiny.base(bits=bits))


@case("loftq_config.loftq_iter")
def _(tiny: Any, cls: Any) -> None:
    with pytest.raises(ValidationError, match="loftq_iter: 2 is not possible"):
        cls(init_lora_weights="loftq", loftq_config={"loftq_iter": 2})


@case("lora_ga_config.direction")
def _(tiny: Any, cls: Any) -> None:
    first, *others = (built(tiny, cls, "lora_ga", direction=name) for name in ("ArB2r", "A2rBr", "ArBr", "random"))
    assert all(tiny.differ(first, other) for other in others)
    assert not tiny.differ(first, built(tiny, cls, "lora_ga"))


@case("lora_ga_config.scale")
def _(tiny: Any, cls: Any) -> None:
    first, *others = (built(tiny, cls, "lora_ga", scale=name) for name in ("stable", "weight_svd", "gd_scale", "unit"))
    assert all(tiny.differ(first, other) for other in others)


@case("lora_ga_config.stable_gamma")
def _(tiny: Any, cls: Any) -> None:
    small, large = (
        next(float(b.norm()) for _, b in tiny.factors(built(tiny, cls, "lora_ga", stable_gamma=value)).values())
        for value in (16, 64)
    )
    assert small / large == pytest.approx(2, rel=1e-3)


def options_of(cls: Any) -> list[str]:
    """Return the dotted names of all options of all sections of a config class."""
    names = []
    for section in SECTIONS.values():
        (field,) = [m.marshmallow_field for m in cls.model_fields[section].metadata if hasattr(m, "marshmallow_field")]
        names += [f"{section}.{name}" for name in field.cls.model_fields]
    return names


PAIRS = [(cls, name) for cls in ALL for name in options_of(cls)]


@pytest.mark.parametrize(("cls", "name"), PAIRS, ids=[f"{cls.type}-{name}" for cls, name in PAIRS])
def test_option_takes_effect(cls: Any, name: str, tiny: Any) -> None:
    cases[name](tiny, cls)


def test_every_option_has_a_case() -> None:
    assert {name for _, name in PAIRS} == set(cases)


@pytest.mark.parametrize("init", SECTIONS)
def test_a_section_may_be_left_out(tiny: Any, init: str) -> None:
    options = {"r": 4, "init_lora_weights": init}
    bits = 4 if init == "loftq" else None
    given, left_out = (
        tiny.attach(LoraConfig(**options, **settings), tiny.base(bits=bits)) for settings in ({SECTIONS[init]: {}}, {})
    )
    assert not tiny.differ(given, left_out)
    assert tiny.differ(given, tiny.attach(LoraConfig(r=4), tiny.base(bits=bits)))
