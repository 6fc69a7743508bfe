"""What `ludwig-peft check` says about the adapters of a valid config."""

from __future__ import annotations

from typing import Any


def adapter_rows(config_obj: Any) -> list[tuple[str, str]]:
    """Return the rows of the table that say which adapters a validated config has, and what is done with each."""
    if config_obj.adapter:
        return [("adapter", str(config_obj.adapter.type))]
    trains = config_obj.trainer.type != "none"
    section = config_obj.adapters
    if section is None:
        return [("adapter", "none: the whole model is trained" if trains else "none")]
    rows = [("adapters", ", ".join(f"{name} ({adapter.type})" for name, adapter in section.objects().items()))]
    if section.merge is not None:
        merge = section.merge
        rows.append(("merged", f"{merge.name}: {', '.join(merge.sources)} ({merge.combination_type})"))
    rows.append(("active", ", ".join(section.active_names())))
    rows.append(("trained", ", ".join(section.trained_names()) if trains else "none"))
    if section.column is not None:
        rows.append(("chosen by column", section.column))
    return rows
