"""Each Triton kernel beside its plain reference, on random inputs; run by tests in the interpreter and on a GPU.

As a script it runs every check on the CPU, with kernels interpreted (TRITON_INTERPRET=1 must be set before). The
interpreter has no arithmetic in bfloat16, so it is given float16 there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ludwig_peft_plugin.engine import elementwise as reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Check = Callable[[str, torch.dtype], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def assert_close(result: Tensor, expected: Tensor, kind: torch.dtype) -> None:
    """Compare by the norm of the difference, relative to that of the expected result."""
    assert result.dtype == expected.dtype
    error = (result.float() - expected.float()).norm() / expected.float().norm()
    assert error < TOLERANCE[kind], float(error)


def tensors(device: str, kind: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).to(kind) for shape in shapes]


def pair(device: str, kind: torch.dtype, rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor] | None:
    """A low-rank product whose factors lie as in a group of layers: one strided, the other transposed or not."""
    if not rank:
        return None
    left, right = tensors(device, kind, (rows, rank + 5), (rank, columns))
    return left[:, 5:], right.T


@check
def rms_norm(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels import rms_norm as kernels

    x, grad, residual, (weight,) = *tensors(device, kind, (5, 100), (5, 100), (5, 100)), tensors(device, kind, (100,))
    ours, expected = kernels.rms_norm(x, weight, 1e-5), reference.reference_rms_norm(x, weight, 1e-5)
    assert_close(ours[0], expected[0], kind)
    assert_close(ours[1], expected[1], torch.float32)
    for count in (1, 2, 3):
        arguments = (x, weight, 1e-5, [grad, x, residual][:count], residual)
        assert_close(kernels.rms_norm_backward(*arguments), reference.reference_rms_norm_backward(*arguments), kind)


@check
def rotate(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels import rope as kernels

    wide, angles = tensors(device, kind, (5, 6 * 32), (5, 16))
    x, cos, sin = wide[:, : 3 * 32].view(5, 3, 32), angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    for inverse in (False, True):
        assert_close(kernels.rotate(x, cos, sin, inverse), reference.reference_rotate(x, cos, sin, inverse), kind)
    there_and_back = kernels.rotate(kernels.rotate(x, cos, sin, False), cos, sin, True)
    assert_close(there_and_back, x.contiguous(), torch.bfloat16)


@check
def short_attention(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels import short_attention as kernels

    many = kernels.SEQUENCES
    for share, size, lengths, seen in ((4, 32, (5, 40, 1, 70), many), (1, 64, (100, 3), many), (3, 32, (17, 1, 33), 2)):
        kernels.SEQUENCES = seen  # at a time; fewer than there are
        tokens, heads = sum(lengths), 2 * share
        shapes = [(tokens, heads, size), (tokens, 2, size), (tokens, 2, size), (tokens, heads, size)]
        (*inputs, grad), (angles,) = tensors(device, kind, *shapes), tensors(device, torch.float32, (tokens, size // 2))
        cos, sin = angles.cos().repeat(1, 2).to(kind), angles.sin().repeat(1, 2).to(kind)
        ends = torch.tensor(lengths, device=device).cumsum(0)
        boundaries = torch.cat([ends.new_zeros(1), ends, ends[-1:], ends[-1:]]).int()  # two empty ones at the end
        for rotation in ((cos, sin), None):
            results = []
            for ours in (True, False):
                leaves = [tensor.clone().requires_grad_() for tensor in inputs]
                if ours:
                    output = kernels.ShortAttention.apply(*leaves, *(rotation or (None, None)), boundaries, size**-0.5)
                else:
                    output = _one_by_one([leaf.float() for leaf in leaves], rotation, lengths).to(kind)
                output.backward(grad)
                results.append([output.detach(), *(leaf.grad for leaf in leaves)])
            for one, other in zip(*results, strict=True):
                assert_close(one, other, kind)
    kernels.SEQUENCES = many


def _one_by_one(inputs: list[Tensor], rotation: tuple[Tensor, Tensor] | None, lengths: tuple[int, ...]) -> Tensor:
    """Attend each sequence by itself, in float32."""
    q, k, v = inputs
    if rotation:
        q, k = (reference.reference_rotate(x, *rotation) for x in (q, k))
    rows = [[part.transpose(0, 1) for part in x.split(lengths)] for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    outputs = [attend(*parts, is_causal=True, enable_gqa=True) for parts in zip(*rows, strict=True)]
    return torch.cat([output.transpose(0, 1) for output in outputs])


@check
def swiglu_adapters(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels.swiglu_adapters import swiglu_adapters_backward_

    for ranks in ((16, 16, 16), (20, 5, 9)):
        columns = tensors(device, kind, (270, 150), (270, 150), (270, 150))
        plus = [pair(device, kind, 270, 150, rank) for rank in ranks]
        ours = swiglu_adapters_backward_(*(tensor.clone() for tensor in columns), *plus)
        copies = [tensor.clone() for tensor in columns]
        expected = reference.reference_swiglu_adapters_backward_(*copies, *plus)
        for one, other in zip(ours, expected, strict=True):
            assert_close(one, other, kind)


@check
def swiglu(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels import swiglu as kernels

    for ranks in ((4, 0, 3), (16, 16, 16), (20, 5, 0), (0, 0, 0)):
        gate, up, grad = tensors(device, kind, (70, 150), (70, 150), (70, 150))
        plus = [pair(device, kind, 70, 150, rank) for rank in ranks]
        assert_close(kernels.swiglu(gate, up, *plus[:2]), reference.reference_swiglu(gate, up, *plus[:2]), kind)
        ours = kernels.swiglu_backward_(gate.clone(), up.clone(), grad.clone(), *plus)
        expected = reference.reference_swiglu_backward_(gate.clone(), up.clone(), grad.clone(), *plus)
        for one, other in zip(ours, expected, strict=True):
            assert_close(one, other, kind)


@check
def add(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels import low_rank as kernels

    for rank in (0, 5, 33):
        y, residual = tensors(device, kind, (70, 150), (70, 150))
        plus = pair(device, kind, 70, 150, rank)
        ours = kernels.add_(y.clone(), plus, residual)
        assert_close(ours, reference.reference_add_(y.clone(), plus, residual), kind)


@check
def dora(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels import dora as kernels

    y, grad, scale, bias = tensors(device, kind, (600, 150), (600, 150), (150,), (150,))
    plus = pair(device, kind, 600, 150, 5)
    assert plus is not None
    for shift in (None, bias):
        ours = kernels.scale_columns_(y.clone(), plus, scale.float(), shift)
        assert_close(ours, reference.reference_scale_columns_(y.clone(), plus, scale.float(), shift), kind)
        results = kernels.scaled_gradient(grad, y, scale.float(), shift)
        expected = reference.reference_scaled_gradient(grad, y, scale.float(), shift)
        for one, other in zip(results, expected, strict=True):
            assert_close(one, other, kind)


@check
def cross_entropy(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels import cross_entropy as kernels

    (logits,) = tensors(device, kind, (7, kernels.BLOCK + 333))
    logits *= 4
    targets = torch.randint(0, logits.shape[1], (7,), device=device)
    targets[:3] = logits[:3].float().argmax(1)
    for with_gradient in (True, False):
        ours, others = logits.clone(), logits.clone()
        losses, hits = kernels.cross_entropy_(ours, targets, with_gradient, 2.0)
        expected_losses, expected_hits = reference.reference_cross_entropy_(others, targets, with_gradient, 2.0)
        assert_close(losses, expected_losses, torch.float32)
        assert torch.equal(hits, expected_hits)
        assert hits[:3].all()
        assert_close(ours, others, kind)
        assert torch.equal(ours, logits) != with_gradient


@check
def dropout(device: str, kind: torch.dtype) -> None:
    from ludwig_peft_plugin.engine.kernels import dropout as kernels

    x = torch.ones(100, 300, device=device, dtype=kind)
    seed = torch.tensor([5], device=device)
    first = kernels.dropout(x, 0.25, seed, 3)
    assert torch.equal(first, kernels.dropout(x, 0.25, seed, 3))
    assert not torch.equal(first, kernels.dropout(x, 0.25, seed, 4))
    assert (
        set(first.float().unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75).to(kind))} or kind != torch.float32
    )
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.02


@check
def four_bit(device: str, kind: torch.dtype) -> None:
    import bitsandbytes.functional as bnb

    from ludwig_peft_plugin.engine.kernels import nf4 as kernels

    (weight,) = tensors(device, kind, (96, 200))
    for nested in (False, True):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        state.code = state.code.to(device)
        assert_close(kernels.dequantize(packed, state), bnb.dequantize_4bit(packed, state), kind)


def _let_scalars_bound_loops() -> None:
    """Let the interpreter's scalars, arrays of one number, be the ends of a `range`, which NumPy 2 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if __name__ == "__main__":
    _let_scalars_bound_loops()
    for name, function in CHECKS.items():
        for kind in (torch.float32, torch.float16):
            function("cpu", kind)
        print("ok", name)
