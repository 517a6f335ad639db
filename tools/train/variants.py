"""The models that are compared: what each changes in the dense ternary one.

Some choose what to change by looking at the model they start from: which matrices bear one bit, which neurons matter.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linear import BitLinear
from model import LINEARS, Model

TERNARY_BITS, BINARY_BITS = 5 / 3, 1.0
WINDOW = 64
A4 = {"attention": "int4", "ffn": "int4", "output": "int8_largest_half"}
A4_ABSMAX = {"attention": "int4_absmax", "ffn": "int4_absmax", "output": "int4_absmax", "down": "int4_absmax"}
TBHA = {"q_proj": "threshold", "k_proj": "threshold", "v_proj": "binary"}
STATEFUL = dict(window=WINDOW, memory=dict(heads=4, width=32))
VECTOR = dict(window=WINDOW, memory=dict(numbers=256))

VARIANTS: dict[str, dict] = {
    "dense": {},
    "binary": dict(weights={name: "binary" for name in LINEARS}),
    "tbha": dict(weights=TBHA),
    "window": dict(window=WINDOW),
    "stateful": dict(**STATEFUL, rho=0.0),
    "stateful-scratch": dict(**STATEFUL, rho=1.0),
    "vector": dict(**VECTOR, rho=0.0),
    "sparse65": {},
    "adaptive": {},
    "a4": dict(activations=A4),
    "all": dict(**STATEFUL, rho=0.0, activations=A4),
}
"""Options of :class:`model.Config`. `sparse65`, `adaptive` and `all` are completed by :func:`choose`."""


@torch.no_grad()
def divergence(model: Model, ids: Tensor, target: Tensor) -> float:
    """KL(target, model) in nats a token; `target` has log-probabilities."""
    log = F.log_softmax(model(ids), -1)
    return F.kl_div(log.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True).item()


def binary_linears(model: Model, ids: Tensor, average_bits: float) -> dict[str, str]:
    """The linears to make binary, the least harmful for the bits it saves first, until the average is reached."""
    with torch.no_grad():
        target = F.log_softmax(model(ids), -1)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear) and ".memory." not in name}
    harm = {}
    for name, linear in linears.items():
        kind, linear.kind = linear.kind, "binary"
        harm[name] = divergence(model, ids, target) / linear.weight.numel()
        linear.kind = kind
    weights = sum(m.weight.numel() for m in linears.values())
    binary, chosen = 0, {}
    for name in sorted(harm, key=harm.get):
        if TERNARY_BITS - (TERNARY_BITS - BINARY_BITS) * binary / weights <= average_bits:
            break
        chosen[name.replace(".self_attn", "").replace(".mlp", "")] = "binary"
        binary += linears[name].weight.numel()
    return chosen


@torch.no_grad()
def keep_neurons(model: Model, ids: Tensor, share: float) -> None:
    """Keeps in each layer the neurons that say most: RMS of what enters down_proj times the norm of its column."""
    for layer in model.layers:
        seen: list[Tensor] = []
        hook = layer.mlp.down_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1)))
        model(ids)
        hook.remove()
        score = seen[0].square().mean(0).sqrt() * layer.mlp.down_proj.quantized().norm(dim=0)
        count = math.ceil(share * len(score))
        layer.mlp.keep(score.topk(count).indices.sort().values)


def choose(name: str, start: Callable[[dict], Model], ids: Tensor) -> Model:
    """The variant, made by `start` from options of :class:`model.Config`; what is to be chosen is by `ids`."""
    options = dict(VARIANTS[name])
    if name in ("adaptive", "all"):
        options["weights"] = binary_linears(start({}), ids, 1.28)
    model = start(options)
    if name in ("sparse65", "all"):
        keep_neurons(model, ids, 0.35)
    return model
