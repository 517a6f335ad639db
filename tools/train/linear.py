"""The linear layer of all these models: no bias, and weights as the kernels multiply them."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from quantize import EPS, binary, ternary, threshold_ternary

KINDS = ("ternary", "binary", "threshold", "values")


class BitLinear(nn.Module):
    """`[.., columns]`, quantized by the caller, to `[.., rows]`.

    `values` are multiplied as they are: what another kind made. `threshold` learns its scale and its threshold, in (0.2, 1.2) means of the magnitudes, from 0.5 on. `live_rows` and
    `live_columns` say what structured sparsity leaves.
    """

    def __init__(self, columns: int, rows: int, kind: str):
        super().__init__()
        assert kind in KINDS, kind
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(rows, columns) * 0.02)
        if kind == "threshold":
            self.tau = nn.Parameter(torch.tensor(0.3).logit())
            self.alpha = nn.Parameter(self.weight.detach().abs().mean())
        self.register_buffer("live_rows", torch.arange(rows))
        self.register_buffer("live_columns", torch.arange(columns))

    def fit_scale(self) -> None:
        """The learned scale that fits the weights best, for weights that came from elsewhere."""
        if self.kind == "threshold":
            with torch.no_grad():
                live = self.weight.abs() > (0.2 + self.tau.sigmoid()) * self.weight.abs().mean()
                self.alpha.copy_(self.weight.abs()[live].mean().clamp(min=EPS))

    def quantized(self) -> Tensor:
        """The weights that are multiplied: of each matrix one magnitude, and zero. What is not live is zero and counts for nothing."""
        dense = self.weight.shape == (len(self.live_rows), len(self.live_columns))
        w = self.weight if dense else self.weight[self.live_rows][:, self.live_columns]
        match self.kind:
            case "threshold":
                w = threshold_ternary(w, 0.2 + self.tau.sigmoid(), self.alpha)
            case "ternary":
                w = ternary(w)
            case "binary":
                w = binary(w)
        if dense:
            return w
        return w.new_zeros(self.weight.shape).index_put((self.live_rows[:, None], self.live_columns[None]), w)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized())
