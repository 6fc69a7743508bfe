"""Options that trade time for memory: they change no result, and say where they cannot work."""

import gc
import shutil
import weakref

import numpy as np
import pytest
from ludwig.callbacks import Callback
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from ludwig_peft_plugin.errors import ModelError
from ludwig_peft_plugin.model.base_model import ASSETS

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


def test_nothing_keeps_an_embedding_that_was_offloaded(make_config, registered, tmp_path, monkeypatch):
    """The optimiser lists all parameters, frozen ones too; the old weight would stay on the GPU with it."""
    from ludwig.schema.model_types.base import ModelConfig

    from ludwig_peft_plugin.model.llm import PeftLLM
    from ludwig_peft_plugin.training.trainer import PeftTrainer

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, tie_word_embeddings=False, **shape)).save_pretrained(tmp_path)
    for tokenizer in (ASSETS / "tiny-llama-python").glob("tokenizer*"):
        shutil.copy(tokenizer, tmp_path)
    trainer = {"type": "finetune", "batch_size": 2, "embedding_offload": True}
    config = ModelConfig.from_dict(make_config(base_model=str(tmp_path), trainer=trainer))
    monkeypatch.setattr("ludwig_peft_plugin.engine.embeddings.host_view", lambda weight: weight.clone())
    llm = PeftLLM(config, _device="cpu")
    before = weakref.ref(llm.model.get_input_embeddings().weight)
    trainer = PeftTrainer(config.trainer, llm, device="cpu")
    gc.collect()
    assert before() is None
    assert trainer.optimizer is not None
