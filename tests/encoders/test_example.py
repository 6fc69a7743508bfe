"""The shipped example of a model with text, category and number columns trains as it is, on fewer rows."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

# Of Ludwig, on saved configs of encoders.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not a valid parameter for the:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_example_trains(new_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # from where the config names its encoder
    config = yaml.safe_load((ROOT / "configs" / "encoder_lora_tabular.yaml").read_text(encoding="utf-8"))
    config["trainer"]["epochs"] = 1
    rows = pd.read_csv(ROOT / "datasets" / "stdlib_areas.csv", keep_default_na=False)
    rows = rows.groupby("split").head(40)
    model = new_model(config)
    results = model.train(dataset=rows, output_directory=str(tmp_path))
    assert results.train_stats["test"]["area"]["accuracy"]
    trained = [name for name, parameter in model.model.named_parameters() if parameter.requires_grad]
    assert any("lora_" in name for name in trained)
    assert not any("embeddings" in name and "lora_" not in name and "text" in name for name in trained)
