"""Every type on every base: how it starts, what has gradients, what stays as it is, and the base when disabled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)  # torch's, of FRoD
EXACT = 2e-5  # rounding of sums, relative to the largest logit; also on 8-bit bases, where the same roundings happen


def tensors(base: Any) -> dict[str, Any]:
    """Return the tensors a base is made of, those that quantised layers keep beside their weights included."""
    found = dict(base.named_parameters()) | dict(base.named_buffers())
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found[f"{name}.absmax"] = state.absmax
        for attribute in ("CB", "SCB"):
            if isinstance(getattr(parameter, attribute, None), torch.Tensor):
                found[f"{name}.{attribute}"] = getattr(parameter, attribute)
    return found


def copies(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def test_starts_as_its_class_says(case: Any) -> None:
    expected = case.logits(case.base())
    model = case.attach()
    start = case.logits(model)
    error = float((start - expected).abs().max() / expected.abs().max())
    if case.cls.starts_as_base:
        assert error <= case.expected.start_on.get(case.base_name, EXACT)
    else:
        assert error > EXACT, "it starts as its base, which its class denies"
        assert case.expected.start is None or error <= case.expected.start
        assert torch.isfinite(start).all()
    assert not torch.equal(case.logits(case.disturbed(model)), start)


class History:
    """What was seen while a model was trained for a few steps."""

    def __init__(self, case: Any) -> None:
        base = case.base()
        self.base_logits = case.logits(base)  # also the pass in which 8-bit layers settle their statistics
        self.of_base = list(base.parameters())
        self.held = tensors(base)
        self.before = copies(self.held)
        self.model = case.attach(base)
        self.trained = case.trained(self.model)
        self.start = case.logits(self.model)
        self.gradients = list(case.run(self.model).steps(range(3)))


@pytest.fixture(scope="module")
def history(case: Any) -> History:
    return History(case)


def test_only_the_adapter_is_trained_and_all_of_it(case: Any, history: History) -> None:
    trained = history.trained
    assert case.trains_base or not any(mine is his for mine in trained.values() for his in history.of_base)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    moved: set[str] = set()
    for gradients in history.gradients:
        assert gradients.keys() <= trained.keys()
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
        moved |= {name for name, gradient in gradients.items() if gradient.abs().max() > 0}
    assert moved == trained.keys(), f"no gradient reaches {sorted(trained.keys() - moved)}"


def test_training_leaves_the_base_as_it_was(case: Any, history: History) -> None:
    held, before = history.held, history.before
    change = (case.logits(history.model) - history.start).abs().max()
    assert change > 10 * EXACT * history.base_logits.abs().max()
    if case.trains_base:
        assert all(not torch.equal(held[name], before[name]) for name in history.trained)
        return
    assert all(torch.equal(held[name], before[name]) for name in before)
    with history.model.disable_adapter():
        assert torch.equal(case.logits(history.model), history.base_logits)


def test_disabled_it_is_the_base(case: Any) -> None:
    expected, with_adapter = case.logits(case.base()), case.logits(case.model)
    assert (with_adapter - expected).abs().max() > 1e-3 * expected.abs().max()
    if case.trains_base:
        with pytest.raises(AttributeError, match="disable_adapter"):
            case.model.disable_adapter()
        return
    with case.model.disable_adapter():
        assert torch.equal(case.logits(case.model), expected)
    assert torch.equal(case.logits(case.model), with_adapter)
