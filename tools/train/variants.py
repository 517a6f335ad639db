"""The models that are compared: what each changes in the dense ternary one.

Some choose what to change by looking at the weights they have: which matrices bear one bit, which neurons matter.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linear import BitLinear
from model import LINEARS, Model

WINDOW = 64
AVERAGE_BITS = 1.28
"""Of an `adaptive` image's linears, a weight."""
KEPT = 0.35
"""The share of the feed-forward neurons that a sparse model has at the end."""
PRUNED_BY, PRUNINGS = 0.5, 20
"""The part of the training after which no more neurons are left out, and in how many steps until then."""
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
    "a4-absmax": dict(activations=A4_ABSMAX),
    "all": dict(**STATEFUL, rho=0.0, activations=A4, weights=TBHA, memory_weights="binary"),
}
"""Options of :class:`model.Config`."""
ADAPTIVE, SPARSE = ("adaptive", "all"), ("sparse65", "all")
"""Those that :func:`choose` completes by widths, and those that lose neurons in training."""


@torch.no_grad()
def divergence(model: Model, ids: Tensor, target: Tensor) -> float:
    """KL(target, model) in nats a token; `target` has log-probabilities."""
    log = F.log_softmax(model(ids), -1)
    return F.kl_div(log.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True).item()


def image_bits(linear: BitLinear) -> int:
    """What the weights that are live take in an image, padding included: see `runtime/kernel/src/format.rs`.

    Tiles of 64 rows by steps of columns: 24 in five blocks of 64 bytes (`tl`), or if binary 32 in four (`b1`).
    """
    columns, blocks = (32, 4) if linear.kind == "binary" else (24, 5)
    return math.ceil(len(linear.live_rows) / 64) * math.ceil(len(linear.live_columns) / columns) * blocks * 64 * 8


def average_bits(model: Model) -> float:
    """Bits a weight of all linears, the memory's with them, as an image has them."""
    linears = [m for m in model.modules() if isinstance(m, BitLinear)]
    return sum(map(image_bits, linears)) / sum(len(m.live_rows) * len(m.live_columns) for m in linears)


def binary_linears(model: Model, ids: Tensor) -> dict[str, str]:
    """The linears to make binary, the least harmful for the bits it saves first, until the average is `AVERAGE_BITS`.

    Those of a memory count and stay as they are. The model is left with what was chosen.
    """
    with torch.no_grad():
        target = F.log_softmax(model(ids), -1)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear) and ".memory." not in name}
    harm = {}
    for name, linear in linears.items():
        kind, bits = linear.kind, image_bits(linear)
        if kind != "binary":
            linear.kind = "binary"
            harm[name] = divergence(model, ids, target) / (bits - image_bits(linear))
            linear.kind = kind
    chosen = {}
    for name in sorted(harm, key=harm.get):
        if average_bits(model) <= AVERAGE_BITS:
            break
        linears[name].kind = "binary"
        chosen[name.replace(".self_attn", "").replace(".mlp", "")] = "binary"
    return chosen


def share_kept(progress: float) -> float:
    """The share of neurons to keep at `progress` of the training, from 1 to `KEPT`: most are left out early, when many are of
    little use (Zhu & Gupta, arXiv 1710.01878)."""
    return KEPT + (1 - KEPT) * max(0.0, 1 - progress / PRUNED_BY) ** 3


@torch.no_grad()
def keep_neurons(model: Model, ids: Tensor, share: float) -> None:
    """Keeps in each layer that share of all neurons, of those that are live the ones that say most: RMS of what enters down_proj
    times the norm of its column."""
    for layer in model.layers:
        seen: list[Tensor] = []
        hook = layer.mlp.down_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, 1)))
        model(ids)
        hook.remove()
        score = seen[0].square().mean(0).sqrt() * layer.mlp.down_proj.quantized().norm(dim=0)
        live = layer.mlp.down_proj.live_columns
        layer.mlp.keep(live[score[live].topk(math.ceil(share * len(score))).indices].sort().values)


def choose(name: str, start: Callable[[dict], Model], ids: Tensor) -> Model:
    """The variant, made by `start` from options of :class:`model.Config`.

    Widths are chosen by `ids`. Where neurons will be lost, that is done with none but those that will be left.
    """
    options = dict(VARIANTS[name])
    if name in ADAPTIVE:
        trial = start(options)
        if name in SPARSE:
            keep_neurons(trial, ids, KEPT)
        options["weights"] = options.get("weights", {}) | binary_linears(trial, ids)
    return start(options)
