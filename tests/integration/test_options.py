"""Options beyond the plain run: each has its effect, through the whole pipeline."""

import errno
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import KillAt, Killed
from ludwig.callbacks import Callback
from safetensors.torch import load_file

from ludwig_peft_plugin.errors import AdapterError

TRAINER = {"type": "finetune", "epochs": 1, "batch_size": 4, "learning_rate": 5e-3}


class Losses(Callback):
    """The training loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_batch_end(self, trainer, progress_tracker, save_path, **kwargs):
        self.values.append(trainer.loss_curve[-1][1])


@pytest.fixture
def losses(make_config, new_model, rows, tmp_path):
    """Return a function that trains with changed sections and returns the loss of each step."""

    def train(**changes):
        record = Losses()
        model = new_model(make_config(**{"trainer": TRAINER, **changes}))
        model.train(dataset=rows, output_directory=str(tmp_path / "run"), callbacks=[record], skip_save_model=True)
        return record.values

    return train


def row_logits(model, dataset):
    model.model.eval()
    with torch.no_grad():
        ids = [torch.from_numpy(np.array(dataset.input_ids[i])).long()[None] for i in range(len(dataset))]
        return [model.model.model(row).logits for row in ids]


def test_neftune_noise_changes_training(losses):
    plain = losses()
    noisy = losses(model_parameters={"neftune_noise_alpha": 5})
    assert noisy[0] != pytest.approx(plain[0], rel=1e-4)
    assert np.isfinite(noisy).all()


def test_gradient_checkpointing_changes_nothing(losses):
    lora = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}
    plain = losses(adapter=lora)
    checkpointed = losses(adapter=lora, trainer={**TRAINER, "enable_gradient_checkpointing": True})
    np.testing.assert_allclose(checkpointed, plain, rtol=1e-5)


def test_gradient_clipping_changes_training(losses):
    clipped = losses(trainer={**TRAINER, "gradient_clipping": {"clipglobalnorm": 1e-6}, "optimizer": {"type": "sgd"}})
    free = losses(trainer={**TRAINER, "gradient_clipping": {"clipglobalnorm": 1e6}, "optimizer": {"type": "sgd"}})
    assert clipped[0] == pytest.approx(free[0])
    assert clipped[-1] != pytest.approx(free[-1], rel=1e-6)


def test_full_fine_tuning_trains_the_base(make_config, new_model, rows, tmp_path):
    from ludwig.api import LudwigModel

    config = make_config(adapter=None, trainer={**TRAINER, "learning_rate": 1e-4, "train_steps": 3})
    model = new_model(config)
    results = model.train(dataset=rows, output_directory=str(tmp_path))
    data = results.preprocessed_data.test_set
    loaded = LudwigModel.load(results.output_directory + "/model")
    for ours, theirs in zip(row_logits(model, data), row_logits(loaded, data), strict=True):
        assert torch.equal(ours, theirs)
    trainable, total = model.model.parameter_counts()
    assert trainable == total


def test_merging_into_a_4_bit_base_keeps_what_was_learned(make_config, new_model, rows, tmp_path):
    from ludwig.api import LudwigModel

    class Before(Callback):
        def on_train_end(self, output_directory):
            self.logits = row_logits(model, data["test"])

    data: dict[str, object] = {}
    config = make_config(
        adapter={"type": "qlora", "r": 4, "postprocessor": {"merge_adapter_into_base_model": True}},
        trainer={**TRAINER, "train_steps": 4},
    )
    model = new_model(config)
    prepared = model.preprocess(dataset=rows)
    data["test"] = prepared.test_set
    before = Before()
    results = model.train(dataset=rows, output_directory=str(tmp_path), callbacks=[before])
    weights = Path(results.output_directory) / "model" / "model_weights"
    assert (weights / "model.safetensors").is_file()
    assert not (weights / "adapter_config.json").exists()
    loaded = LudwigModel.load(results.output_directory + "/model")
    for merged, again, unmerged in zip(
        row_logits(model, prepared.test_set), row_logits(loaded, prepared.test_set), before.logits, strict=True
    ):
        torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-4)
        torch.testing.assert_close(again, merged, rtol=0, atol=1e-5)


def test_a_merge_that_would_be_wrong_is_refused_before_training(make_config, new_model, rows, tmp_path):
    replicated = {"type": "lora", "r": 4, "layer_replication": [[0, 3], [1, 5]], "target_modules": "all-linear"}
    model = new_model(make_config(adapter=replicated, export=[{"format": "merged"}]))
    with pytest.raises(AdapterError, match=r"layer_replication.*Export the adapter instead"):
        model.train(dataset=rows, output_directory=str(tmp_path))


def test_early_stopping(make_config, new_model, rows, tmp_path):
    """A learning rate far too low changes no loss, so the run ends after `early_stop` evaluations."""
    trainer = {**TRAINER, "epochs": 8, "learning_rate": 1e-30, "early_stop": 1}
    results = new_model(make_config(trainer=trainer)).train(dataset=rows, output_directory=str(tmp_path))
    progress = json.loads((Path(results.output_directory) / "model" / "training_progress.json").read_text())
    assert progress["steps"] < 8 * 6


def test_training_goes_on_from_a_local_adapter(make_config, new_model, rows, tmp_path):
    model = new_model(make_config(trainer=TRAINER))
    first = model.train(dataset=rows, output_directory=str(tmp_path / "first"))
    start = model.evaluate(rows.tail(8), output_directory=str(tmp_path))[0]["output"]["loss"]
    folder = first.output_directory + "/model/model_weights"
    lora = {"type": "lora", "pretrained_adapter_weights": folder}
    second = new_model(make_config(adapter=lora, trainer={**TRAINER, "learning_rate": 1e-12, "train_steps": 1}))
    second.train(dataset=rows, output_directory=str(tmp_path / "second"))
    assert second.evaluate(rows.tail(8), output_directory=str(tmp_path))[0]["output"]["loss"] == pytest.approx(start)


@pytest.mark.parametrize("method", ["pissa", "eva", "corda"])
def test_special_initialisations_resume_exactly(method, make_config, new_model, rows, tmp_path):
    lora = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": method}
    if method == "eva":
        lora["eva_config"] = {"rho": 2.0}
    config = make_config(adapter=lora, trainer={**TRAINER, "steps_per_checkpoint": 2, "learning_rate": 1e-3})
    whole = new_model(config).train(dataset=rows, output_directory=str(tmp_path / "whole"))
    with pytest.raises(Killed):
        new_model(config).train(dataset=rows, output_directory=str(tmp_path / "cut"), callbacks=[KillAt(3)])
    (run,) = (tmp_path / "cut").iterdir()
    new_model(config).train(dataset=rows, model_resume_path=str(run))
    adapters = [
        load_file(Path(folder) / "model" / "model_weights" / "adapter_model.safetensors")
        for folder in (whole.output_directory, run)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=0, atol=1e-6)


def test_generate_continues_texts_on_a_cpu(make_config, new_model, rows, tmp_path, capsys):
    model = new_model(make_config(trainer={**TRAINER, "train_steps": 1}))
    model.train(dataset=rows, output_directory=str(tmp_path))
    texts = ["def add(a, b):\n    return", "import os\n"]
    together = model.generate(texts, {"do_sample": False, "max_new_tokens": 6})
    assert [answer.startswith(text) for answer, text in zip(together, texts, strict=True)] == [True, True]
    assert model.generate(texts[0], {"do_sample": False, "max_new_tokens": 6}) == together[0]
    capsys.readouterr()
    assert model.generate(texts[0], {"do_sample": False, "max_new_tokens": 6}, streaming=True) == together[0]
    assert capsys.readouterr().out.strip()


def test_experiment_writes_predictions_and_statistics(make_config, new_model, rows, tmp_path):
    model = new_model(make_config(trainer={**TRAINER, "train_steps": 2}))
    stats, _, _, folder = model.experiment(dataset=rows, output_directory=str(tmp_path))
    assert stats["output"]["perplexity"] > 1
    written = {path.name for path in Path(folder).iterdir()}
    assert {"test_statistics.json", "predictions.parquet", "output_response.csv"} <= written


def test_the_documented_adapter_from_outside_trains(make_config, new_model, rows, tmp_path):
    """The worked example of docs/adapters.md, as a third party's module would run it."""
    from ludwig.schema.llms.peft import adapter_registry

    text = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("my_package_with_an_adapter")
    sys.modules[module.__name__] = module
    try:
        exec(compile(code, "docs/adapters.md", "exec"), module.__dict__)
        model = new_model(make_config(adapter={"type": "my_ia3"}, trainer={**TRAINER, "train_steps": 2}))
        model.train(dataset=rows, output_directory=str(tmp_path))
        trained = [name for name, p in model.model.model.named_parameters() if p.requires_grad]
        assert trained
        assert all("ia3" in name for name in trained)
    finally:
        del adapter_registry["my_ia3"]
        del sys.modules[module.__name__]


def test_a_run_without_anything_to_train_is_refused(make_config, new_model, rows, tmp_path):
    from ludwig_peft_plugin.errors import ModelError

    model = new_model(make_config(trainer={**TRAINER, "layers_to_freeze_regex": ".*"}))
    with pytest.raises(ModelError, match="Nothing would be trained"):
        model.train(dataset=rows, output_directory=str(tmp_path))


def test_a_full_disk_while_training_keeps_the_last_checkpoint(make_config, new_model, rows, tmp_path, monkeypatch):
    from ludwig_peft_plugin.errors import CheckpointError
    from ludwig_peft_plugin.training import checkpoint

    written = checkpoint.save_file

    def full(tensors, path, metadata):
        if json.loads(metadata["state"])["global_step"] >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(tensors, path, metadata=metadata)

    trainer = {**TRAINER, "steps_per_checkpoint": 2}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match=r"No space left.*resume with --model_resume_path"):
            new_model(make_config(trainer=trainer)).train(dataset=rows, output_directory=str(tmp_path))
    (run,) = tmp_path.iterdir()
    record = Losses()
    new_model(make_config(trainer=trainer)).train(dataset=rows, model_resume_path=str(run), callbacks=[record])
    assert len(record.values) == 4  # steps 3 to 6: nothing before the last checkpoint was lost
