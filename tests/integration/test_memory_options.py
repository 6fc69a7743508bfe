"""Options that trade time for memory: they change no result, and say where they cannot work."""

import numpy as np
import pytest
from ludwig.callbacks import Callback
from transformers.modeling_layers import GradientCheckpointingLayer

from ludwig_peft_plugin.errors import ModelError

EXACT_LORA = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}


class Layers(Callback):
    """The losses of a run, and how many layers were checkpointed."""

    def on_batch_end(self, trainer, progress_tracker, save_path, **kwargs):
        layers = [m for m in trainer.model.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.checkpointed = sum(layer.gradient_checkpointing for layer in layers)
        self.losses = [loss for _, loss in trainer.loss_curve]


@pytest.fixture
def run(make_config, new_model, rows, tmp_path):
    """Return a function that trains two steps with trainer options."""

    def train(**options):
        layers = Layers()
        trainer = {"type": "finetune", "train_steps": 2, "batch_size": 4, "learning_rate": 5e-3, **options}
        model = new_model(make_config(trainer=trainer, adapter=EXACT_LORA))
        model.train(dataset=rows, output_directory=str(tmp_path), callbacks=[layers], skip_save_model=True)
        return layers

    return train


def test_the_layers_asked_for_are_checkpointed_and_nothing_changes(run):
    plain, whole = run(), run(enable_gradient_checkpointing=True)
    share = run(enable_gradient_checkpointing=True, checkpoint_layers=0.4)
    assert (plain.checkpointed, share.checkpointed, whole.checkpointed) == (0, 2, 5)
    for other in (share, whole):
        np.testing.assert_allclose(other.losses, plain.losses, rtol=1e-5)


def test_offloading_from_a_cpu_is_refused(run):
    with pytest.raises(ModelError, match=r"trainer\.checkpoint_offload.*cpu.*Remove the option"):
        run(enable_gradient_checkpointing=True, checkpoint_offload=True)
