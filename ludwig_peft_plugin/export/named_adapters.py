"""What an export has to know about several adapters: which one it writes, and that a merged one is up to date."""

from __future__ import annotations

from typing import Any

from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export.result import ExportOptions


def check_choice(config_obj: Any, options: ExportOptions) -> None:
    """Raise `ExportError` where an export names an adapter that there is not, or not one where it has to."""
    section = getattr(config_obj, "adapters", None)
    if section is None:
        if options.adapter is not None:
            raise ExportError(
                f"export.adapter: {options.adapter!r} is for a config with several adapters (`adapters:`); remove it."
            )
        return
    known = [*section.adapters, *([section.merge.name] if section.merge else [])]
    wanted = [options.adapter] if options.adapter else section.active_names()
    if options.adapter is not None and options.adapter not in known:
        raise ExportError(f"export.adapter: there is no adapter {options.adapter!r}; give one of {', '.join(known)}.")
    if len(wanted) > 1 and options.format == "adapter":
        raise ExportError(
            f"export: format adapter writes one adapter, and {', '.join(wanted)} are active; name one: "
            f"{{format: adapter, adapter: {wanted[0]}}}."
        )
    if options.format == "merged":
        for name, adapter in section.objects().items():
            if name in wanted and not getattr(adapter, "mergeable", True):
                raise ExportError(
                    f"export: format merged: adapter type {adapter.type!r} of {name!r} cannot be merged into the "
                    "base's weights; use format: adapter."
                )


def renew_merged(llm: Any) -> None:
    """Make the merged one of several adapters anew from its sources as they are now."""
    section = getattr(llm.config_obj, "adapters", None)
    if section is not None:
        from ludwig_peft_plugin.adapters.several.attach import renew_merge

        renew_merge(llm.model, section)
