"""Estimates of whole configs: their parts, the largest batch, what settings change, and the closed formula."""

from __future__ import annotations

from typing import Any

import pytest

from ludwig_peft_plugin.errors import ModelError

GIB = 2**30
LORA_8B = {"type": "lora", "r": 16, "dropout": 0.0, "target_modules": "all-linear"}


def estimator(config_obj: Any) -> Any:
    from ludwig_peft_plugin.estimate.memory import Estimator

    return Estimator(config_obj)


def plan(config_obj: Any, **arguments: Any) -> Any:
    from ludwig_peft_plugin.estimate.batch import batch_plan
    from ludwig_peft_plugin.model.base_model import load_model_config

    return batch_plan(config_obj, load_model_config(config_obj), **arguments)


@pytest.fixture(scope="module")
def eight_billion(make_config: Any, bases: Any) -> Any:
    """Llama 3.1 8B with LoRA, 8 rows of 1,024 tokens."""
    return estimator(make_config(bases.llama_8b(), LORA_8B, 1024, trainer={"batch_size": 8}))


class TestLlama8B:
    def test_parts(self, eight_billion: Any) -> None:
        estimate = eight_billion.estimate(plan(eight_billion.config_obj).shape(8))
        adapter = 41_943_040
        assert estimate.parameters.base == 8_030_261_248
        assert estimate.parameters.adapter == estimate.parameters.trained == adapter
        assert estimate.at_peak["base"] == pytest.approx(2 * 8_030_261_248, rel=1e-4)
        assert estimate.at_peak["adapter"] == 4 * adapter
        assert estimate.at_peak["optimiser state"] == pytest.approx(8 * adapter, rel=1e-2)
        assert estimate.obstacle is None

    def test_the_engine_keeps_what_it_says(self, eight_billion: Any) -> None:
        """Of a layer and token: two residual states, q, k, v, attention's output and log-sums, gate, up, LoRA's h."""
        hidden, intermediate, keys, heads, rank, layers, tokens = 4096, 14336, 1024, 32, 16, 32, 8192
        numbers = 2 * hidden + 2 * hidden + 2 * keys + 2 * intermediate + 7 * rank
        expected = layers * tokens * (2 * numbers + 4 * heads)
        estimate = eight_billion.estimate(plan(eight_billion.config_obj).shape(8))
        assert estimate.saved == pytest.approx(expected, rel=0.02)
        assert 37 * GIB < estimate.peak < 42 * GIB

    def test_a_recorded_graph_keeps_states_and_gradients(
        self, eight_billion: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shape = plan(eight_billion.config_obj).shape(8)
        states = 2 * 8192 * 4096 * 2
        assert eight_billion.estimate(shape).at_peak["CUDA graphs"] == states + 4 * 41_943_040
        monkeypatch.setenv("LUDWIG_PEFT_CUDA_GRAPHS", "0")
        assert eight_billion.estimate(shape).at_peak["CUDA graphs"] == 0

    def test_layers_as_transformers_wrote_them(
        self, make_config: Any, bases: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A bare loop of transformers, PEFT, flash attention and a fused loss, with bfloat16 adapters, was measured.

        It took 64.0 GiB on an H200; it gave every query head keys and values of its own, which adds 3 GiB.
        """
        monkeypatch.setenv("LUDWIG_PEFT_FUSED", "0")
        plain = estimator(make_config(bases.llama_8b(), LORA_8B, 1024))
        for parameter in plain.llm.trained.values():
            parameter.data = parameter.data.bfloat16()
        repeated_keys = 32 * 8192 * 2 * (4096 - 1024) * 2
        estimate = plain.estimate(plan(plain.config_obj).shape(8))
        assert (estimate.peak + repeated_keys) / GIB == pytest.approx(64.0, rel=0.03)

    def test_a_4_bit_base_is_a_third(self, make_config: Any, bases: Any, eight_billion: Any) -> None:
        """Linear layers take half a byte and 0.127 bits for double quantised scales; embeddings and head stay."""
        quantised = estimator(make_config(bases.llama_8b(), {"type": "qlora", "r": 16}))
        linear = 6_979_321_856
        rest = 8_030_261_248 - linear
        assert quantised.base_bytes == pytest.approx(linear * (0.5 + (8 + 32 / 256) / 64 / 8) + 2 * rest, rel=1e-3)
        assert quantised.adapter_bytes == eight_billion.adapter_bytes


class TestBatches:
    def test_rows_reach_the_limit_of_the_config(self, make_config: Any) -> None:
        shape = plan(make_config(length=48)).shape(4)
        assert (shape.tokens, shape.sequences, shape.longest, shape.targets) == (192, 4, 48, 188)
        assert not shape.accumulated

    def test_without_a_limit_rows_reach_the_context(self, make_config: Any) -> None:
        made = plan(make_config(length=None))
        assert (made.row_tokens, made.limit) == (256, "the model's context")

    def test_the_longest_row_and_the_share_of_targets_can_be_given(self, make_config: Any) -> None:
        made = plan(make_config(length=48), row_tokens=20, target_share=0.25)
        assert made.shape(4).tokens == 80
        assert made.shape(4).targets == 20

    def test_tokens_per_batch(self, make_config: Any) -> None:
        made = plan(make_config(length=48, trainer={"batch_size": 1, "tokens_per_batch": 512}))
        assert (made.unit, made.size, made.option) == ("tokens", 512, "trainer.tokens_per_batch")
        assert made.shape(512).sequences == 11

    def test_effective_batch_size(self, make_config: Any) -> None:
        trainer = {"batch_size": 2, "gradient_accumulation_steps": "auto", "effective_batch_size": 8}
        made = plan(make_config(trainer=trainer))
        assert (made.size, made.accumulation) == (2, 4)
        assert made.shape(2).accumulated

    def test_auto_has_no_size(self, make_config: Any) -> None:
        assert plan(make_config(trainer={"batch_size": "auto"})).size is None


def test_memory_grows_with_the_batch_and_the_largest_fits(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.largest import largest

    made = estimator(make_config())
    shapes = plan(made.config_obj)
    sizes = [made.estimate(shapes.shape(size)).needed for size in (1, 2, 3, 8)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    available = made.estimate(shapes.shape(100)).needed + 1000
    found = largest(lambda size: made.estimate(shapes.shape(size)).needed, available, 4)
    assert made.estimate(shapes.shape(found)).needed <= available < made.estimate(shapes.shape(found + 1)).needed


def test_gradients_of_earlier_micro_batches_are_counted(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUDWIG_PEFT_CUDA_GRAPHS", "0")  # with them the buffers of gradients are always there
    made = estimator(make_config())
    one = plan(made.config_obj).shape(1)
    several = plan(make_config(trainer={"gradient_accumulation_steps": 4})).shape(1)
    once, accumulated = made.estimate(one), made.estimate(several)
    assert accumulated.at_peak["gradients"] >= made.gradient_bytes
    assert accumulated.peak > once.peak


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"trainer": {"enable_gradient_checkpointing": True}}, {}),
        (
            {"trainer": {"enable_gradient_checkpointing": True, "checkpoint_offload": True}},
            {"trainer": {"enable_gradient_checkpointing": True}},
        ),
        (
            {"trainer": {"enable_gradient_checkpointing": True}},
            {"trainer": {"enable_gradient_checkpointing": True, "checkpoint_layers": 0.4}},
        ),
        ({"precision": "bfloat16"}, {"precision": "float32"}),
        ({"adapter": "qlora"}, {"adapter": {"type": "lora", "r": 16, "target_modules": "all-linear"}}),
        ({"adapter": {"type": "lora", "r": 2}}, {"adapter": {"type": "lora", "r": 32}}),
        ({"adapter": None, "trainer": {"optimizer": {"type": "sgd"}}}, {"adapter": None}),
        ({"adapter": None, "trainer": {"use_mixed_precision": True}}, {"adapter": None}),
    ],
)
def test_settings_that_save_memory(less: dict[str, Any], more: dict[str, Any], make_config: Any) -> None:
    peaks = []
    for settings in (less, more):
        config_obj = make_config("tiny-llama-python", length=256, **settings)
        peaks.append(estimator(config_obj).estimate(plan(config_obj).shape(8)).peak)
    assert peaks[0] < peaks[1]


def test_short_rows_of_many_lengths_are_followed_too(eight_billion: Any) -> None:
    """They have an attention kernel of their own, which asks for more than a device that is not there can tell."""
    from ludwig_peft_plugin.estimate.batch import BatchShape

    estimate = eight_billion.estimate(BatchShape(tokens=1000, sequences=9, longest=200, targets=900))
    assert estimate.obstacle is None


def test_an_offloaded_embedding_is_not_on_the_gpu(make_config: Any) -> None:
    there, away = (
        estimator(make_config(trainer={"embedding_offload": offload}, precision="float32")) for offload in (False, True)
    )
    assert there.base_bytes - away.base_bytes == 192 * 64 * 4
    assert there.adapter_bytes == away.adapter_bytes
    shape = plan(there.config_obj).shape(2)
    assert there.estimate(shape).peak - away.estimate(shape).peak == 192 * 64 * 4


def test_evaluating_takes_less_than_training(make_config: Any) -> None:
    made = estimator(make_config("tiny-llama-python", length=256))
    shape = plan(made.config_obj).shape(8)
    assert made.evaluation(shape).peak < made.estimate(shape).peak
    assert made.evaluation(shape).saved < made.estimate(shape).saved
    assert made.llm.model.training


def test_the_closed_formula_is_near_and_says_why(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For layers as transformers wrote them, which is what cannot always be run without data."""
    monkeypatch.setenv("LUDWIG_PEFT_FUSED", "0")
    adapter = {"type": "lora", "r": 4, "dropout": 0.0, "target_modules": "all-linear"}
    made = estimator(make_config("tiny-llama-python", adapter, 256))
    shape = plan(made.config_obj).shape(8)
    followed = made.estimate(shape)

    def refuse(*_: Any) -> None:
        raise NotImplementedError("it asks for data\nand more")

    monkeypatch.setattr(type(made.llm), "forward", refuse)
    formula = made.estimate(shape)
    assert formula.obstacle == "NotImplementedError: it asks for data"
    assert formula.at_peak["activations"] == pytest.approx(followed.at_peak["activations"], rel=0.33)
    assert made.evaluation(shape).at_peak["activations"] == 0


def test_an_optimiser_step_can_be_the_peak(make_config: Any) -> None:
    """Of full fine-tuning on one short row, the step of an optimiser of many tensors takes the most."""
    made = estimator(make_config(adapter=None, trainer={"optimizer": {"type": "adamax"}}))
    estimate = made.estimate(plan(made.config_obj, row_tokens=4).shape(1))
    assert estimate.at_peak["optimiser workspace"] == made.optimiser.step > 0
    assert estimate.at_peak["gradients"] == made.gradient_bytes


def test_errors_name_the_option(make_config: Any) -> None:
    from ludwig_peft_plugin.estimate.report import report

    with pytest.raises(ModelError, match=r"trainer\.type: none"):
        report(make_config(adapter=None, trainer={"type": "none"}))
    with pytest.raises(ModelError, match=r"optimizer\.type"):
        report(make_config(trainer={"optimizer": {"type": "lbfgs"}}))
