"""What a matrix multiplication sees of weights and activations while a model is trained: quantized values, straight-through gradients.

Sources: ternary and int8, BitNet b1.58 (arXiv 2402.17764); binary with a mean scale, BitNet (2310.11453); learned thresholds
as in TWN (1605.04711), trained with a boxcar; int4, fp4 and Top-K, BitNet a4.8 (2411.04965); the rotation, BitNet v2 (2504.18415).
"""
import math

import torch
from torch import Tensor
from torch.autograd import Function

EPS = 1e-5


class StraightThrough(Function):
    """`quantized` forwards, and its gradient to `x` as it is."""

    @staticmethod
    def forward(ctx, x, quantized):
        return quantized

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@torch.no_grad()
def _ternary(w: Tensor) -> Tensor:
    scale = 1.0 / w.abs().mean().clamp(min=EPS)
    return (w * scale).round().clamp(-1, 1).div(scale)


def ternary(w: Tensor) -> Tensor:
    """`clamp(round(w / mean|w|), -1, 1) · mean|w|`, one scale a matrix."""
    return StraightThrough.apply(w, _ternary(w))


@torch.no_grad()
def _binary(w: Tensor) -> Tensor:
    mean = w.abs().mean()
    return torch.where(w >= 0, mean, -mean)


def binary(w: Tensor) -> Tensor:
    """`±mean|w|`, zero is positive; one scale a matrix."""
    return StraightThrough.apply(w, _binary(w))


class ThresholdTernary(Function):
    """`alpha · sign(w) · [|w| > tau · mean|w|]` with `alpha` and `tau` learned, one of each a matrix."""

    @staticmethod
    def forward(ctx, w, tau, alpha):
        mean = w.abs().mean()
        codes = w.sign() * (w.abs() > tau * mean)
        ctx.save_for_backward(w, tau, alpha, codes, mean)
        return codes * alpha

    @staticmethod
    def backward(ctx, gradient):
        w, tau, alpha, codes, mean = ctx.saved_tensors
        to_w = gradient * (w.abs() <= 3 * mean)
        half_width = 0.25 * mean
        near = ((w.abs() - tau * mean).abs() < half_width) / (2 * half_width)
        to_tau = -(gradient * alpha * w.sign() * near).sum() * mean
        return to_w, to_tau, (gradient * codes).sum()


def threshold_ternary(w: Tensor, tau: Tensor, alpha: Tensor) -> Tensor:
    """See :class:`ThresholdTernary`."""
    return ThresholdTernary.apply(w, tau, alpha)


@torch.no_grad()
def _int8(x: Tensor) -> Tensor:
    scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    return (x * scale).round().clamp(-128, 127).div(scale)


def int8(x: Tensor) -> Tensor:
    """Per token `q = clamp(round(x · 127 / max|x|), -128, 127)`."""
    return StraightThrough.apply(x, _int8(x))


@torch.no_grad()
def _int4(x: Tensor) -> Tensor:
    scale = math.sqrt(7) / x.abs().mean(-1, keepdim=True).clamp(min=EPS)
    return (x * scale).round().clamp(-8, 7).div(scale)


def int4(x: Tensor) -> Tensor:
    """Per token `q = clamp(round(x · √7 / mean|x|), -8, 7)`. That large values are cut off is intended."""
    return StraightThrough.apply(x, _int4(x))


@torch.no_grad()
def _int4_absmax(x: Tensor) -> Tensor:
    scale = 7 / x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    return (x * scale).round().clamp(-8, 7).div(scale)


def int4_absmax(x: Tensor) -> Tensor:
    """Per token `q = clamp(round(x · 7 / max|x|), -8, 7)`: nothing is cut off, and what is small becomes zero."""
    return StraightThrough.apply(x, _int4_absmax(x))


@torch.no_grad()
def largest_half(x: Tensor) -> Tensor:
    """1 at the half of a token's values that are largest by magnitude (of equal ones the first), else 0."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x).scatter(-1, order[..., : (x.shape[-1] + 1) // 2], 1.0)


def int8_largest_half(x: Tensor) -> Tensor:
    """:func:`int8` of the half that is largest by magnitude, and zero elsewhere; the scale is that of all."""
    return StraightThrough.apply(x, _int8(x) * largest_half(x))


@torch.no_grad()
def _fp4(x: Tensor) -> Tensor:
    scale = 12 / x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    y = x * scale
    step = torch.where(y.abs() < 4, 1.0, torch.where(y.abs() < 8, 2.0, 4.0))
    return ((y / step).round() * step).div(scale)


def fp4(x: Tensor) -> Tensor:
    """Per token the floats of one sign, two exponent and one mantissa bit, of which the largest is that of the largest magnitude."""
    return StraightThrough.apply(x, _fp4(x))


def hadamard(x: Tensor) -> Tensor:
    """Runs of the last dimension, as long as the largest power of two that divides it, by orthonormal Hadamard matrices."""
    width = x.shape[-1]
    run = width & -width
    y, apart = x.unflatten(-1, (-1, run)), 1
    while apart < run:
        a, b = y.unflatten(-1, (-1, 2, apart)).unbind(-2)
        y, apart = torch.stack((a + b, a - b), -2).flatten(-3), 2 * apart
    return y.flatten(-2) / math.sqrt(run)


ACTIVATIONS = {
    "int8": int8,
    "int4": int4,
    "int4_absmax": int4_absmax,
    "int8_largest_half": int8_largest_half,
    "fp4": fp4,
    "int8_hadamard": lambda x: int8(hadamard(x)),
    "int4_hadamard": lambda x: int4(hadamard(x)),
}
