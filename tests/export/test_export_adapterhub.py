"""Export format `adapterhub`: written, read back to the trained model, described, and refused for other adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from disturbed import disturbed

from ludwig_peft_plugin.adapters.build import attach_adapter
from ludwig_peft_plugin.adapters.methods.bottleneck import BottleneckAdapterConfig
from ludwig_peft_plugin.errors import ExportError
from ludwig_peft_plugin.export.run import check_exports, export_all
from ludwig_peft_plugin.export.summary import TrainingSummary


@pytest.mark.parametrize("bits", [None, 4])
def test_the_folder_is_the_trained_model(
    make_llm: Any, summary: TrainingSummary, tmp_path: Path, bits: int | None
) -> None:
    llm = make_llm(adapter=False, bits=bits, export=["adapterhub", "adapter"])
    llm.config_obj.adapter = BottleneckAdapterConfig(architecture="houlsby", bottleneck_size=5, ln_before=True)
    llm.model = attach_adapter(llm.model.requires_grad_(False), llm.config_obj.adapter)
    disturbed(llm.model, 0.1)
    results = export_all(llm, str(tmp_path), summary)
    assert [result.format for result in results] == ["adapterhub", "adapter"]
    assert all(result.max_abs_difference < 1e-5 for result in results)
    cards = [(Path(result.folder) / "README.md").read_text() for result in results]
    assert "adapters.init(model)" in cards[0]
    assert "library_name: adapters" in cards[0]
    assert "import ludwig_peft_plugin.adapters.bottleneck" in cards[1]
    assert {path.name for path in Path(results[0].folder).iterdir()} >= {"adapter_config.json", "adapter.safetensors"}


def test_other_adapters_are_refused(make_llm: Any) -> None:
    with pytest.raises(ExportError, match="one bottleneck adapter"):
        check_exports(make_llm(export=["adapterhub"]).config_obj)
