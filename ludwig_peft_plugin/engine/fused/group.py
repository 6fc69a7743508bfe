r"""Linear layers that read the same input, with LoRA or DoRA: what one forward and one backward pass of them compute.

    h_i = dropout(x) A_i^T
    y_i = c_i \odot (x W_i^T + s_i h_i B_i^T) + b_i

    dB_i = s_i g_i'^T h_i      dA_i = s_i (g_i' B_i)^T dropout(x)      dx = \sum_i g_i' W_i + s_i g_i' B_i A_i
    g_i' = c_i \odot g_i

LoRA (Hu et al. 2021, arXiv:2106.09685) has c = 1. DoRA (Liu et al. 2024, arXiv:2402.09353) has
c = m / ||W + s B A||_row, the norm taken as a constant, and dm = \sum_t g_t \odot (y_t - b) / m.

The A of all layers are one matrix, so x is read once for all of them. Adapter weights are float32; products are in the
dtype of x, gradients of adapter weights come out in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ludwig_peft_plugin.engine.dropout import dropout
from ludwig_peft_plugin.engine.elementwise import LowRank, scale_columns_, scaled_gradient
from ludwig_peft_plugin.engine.frozen import FrozenLinear


@dataclass
class Adapter:
    """The LoRA or DoRA of one linear layer; A (r, in), B (out, r) and the magnitude m (out,) are parameters."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass
class Member:
    """One linear layer: its frozen half and its adapter, if it has one."""

    frozen: FrozenLinear
    adapter: Adapter | None
    squared_norms: Tensor | None = None  # of the frozen weight's rows, for DoRA


@dataclass
class Kept:
    """What a group's forward pass leaves for its backward pass, besides its input."""

    h: Tensor | None = None  # (T, sum of ranks)
    a: Tensor | None = None  # all A, in the dtype of x
    b: list[Tensor | None] = field(default_factory=list)  # s_i B_i, in the dtype of x
    scales: list[Tensor | None] = field(default_factory=list)  # DoRA's c_i
    dropped: bool = False  # whether dropout was active
    added: bool = True  # whether the outputs contain the adapters' share already

    def plus(self, index: int) -> LowRank:
        """Return what is still to be added to the output of layer `index`: h_i (T, r) and s_i B_i (out, r)."""
        b = self.b[index]
        if self.added or b is None:
            return None
        assert self.h is not None
        start = sum(other.shape[1] for other in self.b[:index] if other is not None)
        return self.h[:, start : start + b.shape[1]], b

    def plus_input_gradient(self, grad_h: Tensor | None) -> LowRank:
        """Return what is still to be added to the gradient of x: that of h (T, r) and A^T (in, r)."""
        return None if grad_h is None or self.a is None else (grad_h, self.a.T)


class LinearGroup:
    """Linear layers with the same input, in a fixed order.

    Args:
        members: the layers.
        stream: the number of the first layer's dropout mask; each adapter takes one.
    """

    def __init__(self, members: list[Member], stream: int = 0) -> None:
        self.members = members
        self.stream = stream
        self.adapters = [member.adapter for member in members if member.adapter is not None]
        self.a: Tensor | None = None  # all A below one another, (sum of ranks, in), in the dtype of the computation
        self.b: list[Tensor] = []  # each adapter's s B, (out, r), likewise

    @property
    def parameters(self) -> list[Tensor]:
        """The trained tensors, in the order in which `adapter_gradients` returns their gradients."""
        found: list[Tensor] = []
        for adapter in self.adapters:
            found += [adapter.a, adapter.b] + ([] if adapter.magnitude is None else [adapter.magnitude])
        return found

    @property
    def uses_dora(self) -> bool:
        """Whether the backward pass needs the outputs."""
        return any(adapter.magnitude is not None for adapter in self.adapters)

    def allocate(self, dtype: torch.dtype) -> None:
        """Make room for the adapters in the dtype of the computation; `refresh` fills it."""
        if self.adapters:
            first = self.adapters[0].a
            self.a = first.new_empty((sum(adapter.rank for adapter in self.adapters), first.shape[1]), dtype=dtype)
            self.b = [torch.empty_like(adapter.b, dtype=dtype, requires_grad=False) for adapter in self.adapters]

    def forward(self, x: Tensor, *, training: bool, add: bool = True) -> tuple[list[Tensor], Kept]:
        """Return each layer's output (T, out_i) for x (T, in).

        Args:
            x: the common input.
            training: whether dropout is active.
            add: False leaves LoRA's share to the caller (`Kept.plus`), who adds it while reading the outputs anyway.
        """
        kept = self._shrunk(x, training, added=add or self.uses_dora)
        prepared = self.members[0].frozen.prepare(x)
        outputs = [member.frozen.forward(prepared) for member in self.members]
        start, rounded = 0, iter(self.b)
        for member, y in zip(self.members, outputs, strict=True):
            adapter, bias, b, scale = member.adapter, member.frozen.bias, None, None
            if adapter is not None:
                assert kept.h is not None
                b = next(rounded)
                h = kept.h[:, start : start + adapter.rank]
                start += adapter.rank
                if adapter.magnitude is not None:
                    scale = self._dora_scale(member, adapter, x.dtype)
                    scale_columns_(y, (h, b), scale, bias)
                elif kept.added:
                    y.addmm_(h, b.T)
            if bias is not None and scale is None:
                y.add_(bias)
            kept.b.append(b)
            kept.scales.append(scale)
        return outputs, kept

    def keep(self, x: Tensor, *, training: bool) -> Kept:
        """Return what `forward` keeps, without making the outputs; for LoRA."""
        kept, rounded = self._shrunk(x, training, added=False), iter(self.b)
        kept.b = [None if member.adapter is None else next(rounded) for member in self.members]
        kept.scales = [None] * len(self.members)
        return kept

    def _shrunk(self, x: Tensor, training: bool, *, added: bool) -> Kept:
        kept = Kept(added=added)
        if self.adapters:
            kept.a = self.a
            kept.dropped = training and any(adapter.dropout for adapter in self.adapters)
            kept.h = self._down(x, kept)
        return kept

    def input_gradient(
        self,
        kept: Kept,
        grads: list[Tensor],
        outputs: list[Tensor] | None,
        *,
        needed: bool,
        add: bool = True,
        of_b: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
        """Return the gradient of x, that of h (scaled), and those of B and m in the order of the adapters.

        The gradient of x comes as tensors to be added up: none where it is not needed, one for each layer at most.

        Args:
            kept: what the forward pass left.
            grads: gradients of the outputs, each (T, out_i).
            outputs: what the forward pass returned; only DoRA needs them.
            needed: whether the gradient of x is wanted.
            add: False leaves the adapters' share of the gradient of x to the caller (`Kept.plus_input_gradient`).
            of_b: g_i^T h_i of every layer, each (out_i, r_i) in float32, where the caller has them already; for LoRA.
        """
        parts: list[Tensor] = []
        grad_h = torch.empty_like(kept.h) if kept.h is not None else None
        of_parameters: list[Tensor] = []
        start = 0
        for index, (member, grad) in enumerate(zip(self.members, grads, strict=True)):
            adapter, b, scale = member.adapter, kept.b[index], kept.scales[index]
            if adapter is not None:
                assert kept.h is not None
                assert grad_h is not None
                assert b is not None
                of_magnitude = []
                if scale is not None:
                    assert outputs is not None
                    assert adapter.magnitude is not None
                    grad, sums = scaled_gradient(grad, outputs[index], scale, member.frozen.bias)
                    of_magnitude = [sums / adapter.magnitude]
                columns = slice(start, start + adapter.rank)
                torch.mm(grad, b, out=grad_h[:, columns])
                products = product_fp32(grad.T, kept.h[:, columns]) if of_b is None else of_b[index]
                of_parameters += [products * adapter.scaling, *of_magnitude]
                start += adapter.rank
            if needed:
                parts += member.frozen.input_gradient(grad, parts.pop() if parts else None)
        if needed and add and grad_h is not None:
            self._add_adapter_input_gradient_(parts[0], grad_h, kept)
        return parts, grad_h, of_parameters

    def adapter_gradients(
        self, x: Tensor, kept: Kept, grad_h: Tensor | None, others: list[Tensor], weight: Tensor | None = None
    ) -> list[Tensor]:
        """Return the gradients of `parameters`, given the input, the gradient of h and those of B and m.

        With a `weight`, shape (in,), the input was x times that; not together with dropout.
        """
        if grad_h is None:
            return []
        remaining, found, start = list(others), [], 0
        of_a = None if kept.dropped else product_fp32(grad_h.T, x)
        if of_a is not None and weight is not None:
            of_a *= weight
        for number, adapter in enumerate(self.adapters):
            columns = slice(start, start + adapter.rank)
            if of_a is None:
                found.append(product_fp32(grad_h[:, columns].T, dropout(x, adapter.dropout, self.stream + number)))
            else:
                found.append(of_a[columns])
            found += [remaining.pop(0) for _ in range(1 if adapter.magnitude is None else 2)]
            start += adapter.rank
        return found

    def _down(self, x: Tensor, kept: Kept) -> Tensor:
        assert kept.a is not None
        if not kept.dropped:
            return x @ kept.a.T
        h, start = x.new_empty((len(x), len(kept.a))), 0
        for number, adapter in enumerate(self.adapters):
            columns = slice(start, start + adapter.rank)
            torch.mm(dropout(x, adapter.dropout, self.stream + number), kept.a[columns].T, out=h[:, columns])
            start += adapter.rank
        return h

    def _add_adapter_input_gradient_(self, total: Tensor, grad_h: Tensor, kept: Kept) -> None:
        assert kept.a is not None
        if not kept.dropped:
            total.addmm_(grad_h, kept.a)
            return
        start = 0
        for number, adapter in enumerate(self.adapters):
            columns = slice(start, start + adapter.rank)
            total.add_(dropout(grad_h[:, columns] @ kept.a[columns], adapter.dropout, self.stream + number))
            start += adapter.rank

    @staticmethod
    def _dora_scale(member: Member, adapter: Adapter, dtype: torch.dtype) -> Tensor:
        r"""Return c = m / ||W + s B A||, shape (out,), float32.

        ||w_i + s b_i A||^2 = ||w_i||^2 + 2 s b_i . (A w_i) + s^2 b_i (A A^T) b_i^T, so W is read once and no matrix of
        its size is made. The norm is rounded to the base's dtype, as PEFT does, so that c starts at exactly 1.
        """
        assert adapter.magnitude is not None
        weight = member.frozen.weight(dtype)
        if member.squared_norms is None:
            member.squared_norms = weight.float().square().sum(dim=1)
        a, b, s = adapter.a.float(), adapter.b.float(), adapter.scaling
        crossed = product_fp32(weight, a.to(weight.dtype).T)
        squares = member.squared_norms + 2 * s * (crossed * b).sum(1) + s * s * ((b @ (a @ a.T)) * b).sum(1)
        norms = squares.clamp_min(0).sqrt().to(weight.dtype)
        return adapter.magnitude.float() / norms.float()


@torch.no_grad()
def refresh(groups: list[LinearGroup]) -> None:
    """Round the adapters of all groups to the dtype of the computation: once for a forward and a backward pass."""
    found = [group for group in groups if group.a is not None]
    adapters = [adapter for group in found for adapter in group.adapters]
    if not adapters:
        return
    rounded = [b for group in found for b in group.b]
    for group in found:
        assert group.a is not None
        rounded += group.a.split([adapter.rank for adapter in group.adapters])
    scaled = torch._foreach_mul([adapter.b for adapter in adapters], [adapter.scaling for adapter in adapters])
    torch._foreach_copy_(rounded, [*scaled, *(adapter.a for adapter in adapters)])


def product_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32; 16-bit inputs are summed in float32 and not rounded in between."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
