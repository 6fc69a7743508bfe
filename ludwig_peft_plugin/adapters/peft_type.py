"""Make a tuner of one's own known to PEFT, so that its folders load with `PeftModel.from_pretrained`."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def register_tuner(name: str, config: type[Any], model: type[Any]) -> None:
    """Register a tuner under a PEFT type of its own; registering the same one again changes nothing.

    PEFT registers tuners for the members of its enumeration of types alone, so the type becomes one first.

    Args:
        name: of the type, in lower case; in `adapter_config.json` it stands in upper case.
        config: the tuner's `PeftConfig`.
        model: its `BaseTuner`; the attribute `prefix` begins the names of its weights.

    Raises:
        KeyError: PEFT, or someone else, has a tuner of that name.
    """
    member = peft_type(name.upper())
    if PEFT_TYPE_TO_TUNER_MAPPING.get(member) is not model:
        register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)


def peft_type(name: str) -> PeftType:
    """Return the member of PEFT's enumeration called `name`, which is added where there is none.

    Python offers no way to extend an enumeration, so this fills in what it does when the class is made.
    """
    if name not in PeftType.__members__:
        kind: Any = PeftType
        member = str.__new__(kind, name)
        member._name_ = member._value_ = name
        member.__objclass__ = kind
        member._sort_order_ = len(kind)
        type.__setattr__(kind, name, member)
        kind._member_names_.append(name)
        kind._member_map_[name] = kind._value2member_map_[name] = member
    return PeftType[name]
