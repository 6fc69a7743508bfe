"""How rows are grouped, through the whole pipeline: packing, token budgets, measured sizes, and what is logged."""

import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import KillAt, Killed
from ludwig.callbacks import Callback
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ludwig_peft_plugin.errors import DataError

TRAINER = {"type": "finetune", "epochs": 2, "learning_rate": 5e-3}
EXACT_LORA = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}


class Steps(Callback):
    """What each step of a run was made of."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.parts: list[list[int]] = []  # tokens that are read, with filler, of each micro-batch of a step

    def on_train_start(self, model, config, config_fp):
        self.model = model
        forward = model.forward

        def recording(inputs, mask=None):
            if model.training:
                self.parts[-1].append(len(inputs.input_ids))
            return forward(inputs, mask)

        model.forward = recording

    def on_batch_start(self, trainer, progress_tracker, save_path):
        self.parts.append([])

    def on_batch_end(self, trainer, progress_tracker, save_path, **kwargs):
        self.tokens.append(progress_tracker.incremental_step_token_usage[str(progress_tracker.steps - 1)])
        self.losses.append(trainer.loss_curve[-1][1])


@pytest.fixture
def run(make_config, new_model, rows, tmp_path):
    """Return a function that trains with trainer options and returns (steps, results, lengths of the rows)."""

    def train(kill_at=None, folder="run", sections=None, **trainer):
        steps = Steps()
        config = make_config(trainer={**TRAINER, **trainer}, adapter=EXACT_LORA, **(sections or {}))
        model = new_model(config)
        callbacks = [steps, KillAt(kill_at)]
        results = model.train(dataset=rows, output_directory=str(tmp_path / folder), callbacks=callbacks)
        return steps, results, results.preprocessed_data.training_set.input_ids.lengths

    return train


def adapter(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model" / "model_weights" / "adapter_model.safetensors")


def test_packing_fills_batches_and_trains_every_row_once_an_epoch(run):
    steps, _, lengths = run(packing=True, batch_size=3)
    capacity = 3 * (max(lengths) - 1)  # the last token of a row is not read
    count = len(steps.tokens) // 2
    assert count == -(-sum(lengths - 1) // capacity)  # no fewer batches are possible
    assert sum(steps.tokens[:count]) == sum(steps.tokens[count:]) == sum(lengths)
    assert max(map(max, steps.parts)) <= capacity
    assert sorted(steps.tokens[:count]) == sorted(steps.tokens[count:])
    assert steps.losses[-1] < steps.losses[0]


def test_packing_takes_its_length_from_the_preprocessing_section(run):
    steps, _, lengths = run(packing=True, batch_size=2, sections=_limited(180))
    assert max(lengths) <= 180
    assert 180 < max(map(max, steps.parts)) <= 360
    assert len(steps.tokens) // 2 < len(lengths) / 2  # more than two short rows in a batch


def _limited(tokens: int) -> dict[str, object]:
    return {"preprocessing": {"split": {"type": "fixed"}, "global_max_sequence_length": tokens}}


def test_tokens_per_batch_takes_as_many_rows_as_fit(run):
    steps, _, lengths = run(tokens_per_batch=400)
    plain, _, _ = run(batch_size=1)
    assert len(steps.tokens) < len(plain.tokens)
    assert max(lengths) < max(map(max, steps.parts)) <= 400
    assert sum(steps.tokens) == 2 * sum(lengths) == sum(plain.tokens)


def test_accumulation_counts_batches(run):
    """Two packed batches a step learn what one of twice the size with the same rows would."""
    steps, _, lengths = run(packing=True, tokens_per_batch=300, gradient_accumulation_steps=2, epochs=1)
    assert {len(parts) for parts in steps.parts[:-1]} == {2}
    assert max(map(max, steps.parts)) <= 300 < max(steps.tokens)
    assert sum(steps.tokens) == sum(lengths)


def test_one_batch_of_all_rows_is_the_same_packed_or_not(run):
    """What a step learns does not depend on how its rows lie in batches."""
    everything = {"epochs": 3, "gradient_accumulation_steps": 24}
    plain, _, lengths = run(batch_size=24, epochs=3)
    packed, _, _ = run(packing=True, tokens_per_batch=int(max(lengths)) + 50, **everything)
    assert len(plain.losses) == len(packed.losses) == 3
    np.testing.assert_allclose(packed.losses, plain.losses, rtol=2e-5)


def test_compiled_batches_have_one_length(run):
    steps, _, _ = run(packing=True, tokens_per_batch=512, compile=True, epochs=1)
    assert {length for parts in steps.parts for length in parts} == {512}


@pytest.mark.parametrize("options", [{"tokens_per_batch": 64}, {"tokens_per_batch": 64, "packing": True}])
def test_a_row_that_does_not_fit_stops_the_run_at_its_start(run, options):
    with pytest.raises(DataError, match=r"trainer\.tokens_per_batch: 64 .*longest row.*tokens"):
        run(**options)


def test_a_packed_run_resumes_in_the_middle_of_an_epoch(run, make_config, new_model, rows, tmp_path):
    options = {"packing": True, "tokens_per_batch": 300, "steps_per_checkpoint": 3}
    whole, results, _ = run(folder="whole", **options)
    count = len(whole.losses) // 2
    assert count % 3  # so that a checkpoint lies in the middle of an epoch
    with pytest.raises(Killed):
        run(folder="cut", kill_at=count + 2, **options)
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    (cut,) = (tmp_path / "cut").iterdir()
    rest = Steps()
    config = make_config(trainer={**TRAINER, **options}, adapter=EXACT_LORA)
    new_model(config).train(dataset=rows, model_resume_path=str(cut), callbacks=[rest])
    assert 0 < len(rest.losses) < len(whole.losses)
    assert rest.losses == whole.losses[-len(rest.losses) :]
    assert rest.tokens == whole.tokens[-len(rest.tokens) :]
    ours, theirs = adapter(cut), adapter(results.output_directory)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("packing", [False, True])
def test_automatic_size_is_measured_kept_and_changes_nothing_else(packing, run, caplog):
    with caplog.at_level(logging.INFO, logger="ludwig_peft_plugin"):
        steps, results, lengths = run(batch_size="auto", packing=packing)
    (message,) = (text for text in caplog.messages if text.startswith("batch_size auto"))
    assert "tokens/s measured" in message
    size = int(message.split(":")[1].split()[1])
    saved = json.loads((Path(results.output_directory) / "model" / "model_hyperparameters.json").read_text())["trainer"]
    if packing:
        assert (saved["batch_size"], saved["tokens_per_batch"]) == (1, size)
        assert max(lengths) <= size
    else:
        assert (saved["batch_size"], saved["tokens_per_batch"]) == (size, None)
        assert size <= 0.2 * len(lengths)
    given, _, _ = run(**({"tokens_per_batch": size, "packing": True} if packing else {"batch_size": size}))
    assert steps.losses == given.losses


def test_tensorboard_has_every_step_with_its_own_loss(run):
    steps, results, _ = run(batch_size=2)
    (folder,) = Path(results.output_directory).glob("model/logs/training")
    events = EventAccumulator(str(folder)).Reload()
    assert {"combined/step_training_loss", "output/step_training_loss", "combined/step_learning_rate"} <= set(
        events.Tags()["scalars"]
    )
    for tag, values in (
        ("combined/step_training_loss", steps.losses),
        ("output/step_training_loss", steps.losses),
        ("tokens/tokens", steps.tokens),
        ("tokens/total_tokens_used", np.cumsum(steps.tokens)),
    ):
        logged = events.Scalars(tag)
        assert [event.step for event in logged] == list(range(len(values)))
        np.testing.assert_allclose([event.value for event in logged], values, rtol=1e-6)


class Profile(Callback):
    """Profiles the third step."""

    def __init__(self) -> None:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)

    def on_batch_start(self, trainer, progress_tracker, save_path):
        if progress_tracker.steps == 2:
            self.profile.start()

    def on_batch_end(self, trainer, progress_tracker, save_path, **kwargs):
        if progress_tracker.steps == 3:
            self.profile.stop()


def test_a_profile_names_the_stages_of_a_step(make_config, new_model, rows, tmp_path):
    profile = Profile()
    model = new_model(make_config(trainer={**TRAINER, "train_steps": 3, "batch_size": 4}))
    model.train(dataset=rows, output_directory=str(tmp_path), callbacks=[profile], skip_save_model=True)
    events = {event.key: event for event in profile.profile.key_averages()}
    assert {"data", "forward", "backward", "optimizer", "logging"} <= events.keys()
    assert events["forward"].count == events["backward"].count == events["optimizer"].count == 1


def test_a_diverging_run_says_so_and_ends_at_the_next_checkpoint(run, caplog):
    growing = {"type": "sgd", "weight_decay": 2.8e4}  # each step makes the adapter 1.8 times as large
    trainer = {"batch_size": 2, "epochs": 4, "learning_rate": 1e-4, "optimizer": growing}
    with caplog.at_level(logging.WARNING, logger="ludwig_peft_plugin"):
        steps, _, lengths = run(**trainer, gradient_clipping={"clipglobalnorm": 1e9})
    first = next(step for step, loss in enumerate(steps.losses, start=1) if not np.isfinite(loss))
    assert [text for text in caplog.messages if text.startswith(f"Step {first}: the training loss became")]
    assert any("trained parameters" in message for message in caplog.messages)
    per_epoch = len(lengths) // 2
    assert len(steps.losses) == -(-first // per_epoch) * per_epoch < 4 * per_epoch
