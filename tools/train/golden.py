#!/usr/bin/env python3
"""Makes small random checkpoints of what only we have, and what PyTorch computes of them and of the bundled stateful model: tests of
the runtime compare with it.

  python golden.py ../../tests/golden ../../models/stories-stateful
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch

import checkpoint
from linear import BitLinear
from model import Config, Model
from variants import A4, A4_ABSMAX, TBHA

MATRICES = dict(heads=2, width=16)
SETS = {
    "bitrnn_m": dict(memory=MATRICES),
    "bitrnn_m_a4": dict(memory=MATRICES, activations=A4, weights={"v_proj": "binary"}, memory_weights="binary"),
    "bitrnn_m_late": dict(memory=MATRICES, delayed_writes=True),
    "bitrnn_v": dict(memory=dict(numbers=44)),
    "bitrnn_v_late": dict(memory=dict(numbers=44), delayed_writes=True),
    "shared": dict(memory=dict(shared=1)),
    "shared_late": dict(memory=dict(shared=1), delayed_writes=True),
    "window": dict(),
    "a4_absmax": dict(activations=A4_ABSMAX),
    "fp4": dict(activations={"attention": "fp4", "output": "fp4", "ffn": "fp4"}),
    "rotated": dict(activations={"attention": "int8_hadamard", "output": "int4_hadamard", "ffn": "int4", "down": "int4_hadamard"}),
    "tbha": dict(window=0, weights=TBHA),
}
"""All but the last with a window that most of the tokens have left."""
TOKENS = 48
TOLD, COMPARED = 160, 32
"""Tokens that the bundled model tells from the first on, always the likeliest, and of how many of the last the logits are kept."""


def main() -> None:
    torch.set_num_threads(1)
    for name, options in SETS.items():
        torch.manual_seed(len(name))
        shape = dict(vocab=128, hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, window=12, sinks=2)
        model = Model(Config(**(shape | options)))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if p.dim() == 2:
                    p.copy_(torch.randn(p.shape) * (0.3 if "taps" in key else 0.1))
                elif key.endswith(".bound"):
                    p.uniform_(0, 0.8)
                elif key.endswith(("rho", "norm", "norm.weight", "layernorm.weight")):
                    p.copy_(1 + 0.2 * torch.randn(p.shape))
                else:
                    p.add_(0.3 * torch.randn(p.shape))
        for linear in (m for m in model.modules() if isinstance(m, BitLinear)):
            linear.fit_scale()
        place = Path(sys.argv[1]) / name
        checkpoint.save(model, place)
        ids = torch.randint(0, 128, (1, TOKENS))
        with torch.no_grad():
            logits = checkpoint.exported(place)(ids)[0]
        np.save(place / "logits_f32.npy", logits.numpy())
        (place / "ids.json").write_text(json.dumps(dict(input_ids=ids.tolist())) + "\n")
        for made in ("masters.safetensors", "train.json"):
            (place / made).unlink()

    bundled, place = Path(sys.argv[2]), Path(sys.argv[1]) / Path(sys.argv[2]).name
    model, ids = checkpoint.exported(bundled), torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        while ids.shape[1] < TOLD:
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
        logits, precise = model(ids)[0], model.double()(ids)[0]
    # Some of the roundings to int8 flip between any two orders of summation, and all that come after see it: so the measure is how far
    # PyTorch is from itself.
    apart = (logits - precise).abs().amax(-1)[-COMPARED:]
    place.mkdir(exist_ok=True)
    np.save(place / "logits_f32.npy", logits[-COMPARED:].numpy())
    differences = dict(largest=apart.max().item(), median=apart.median().item())
    best = logits.topk(2).values
    margins = [round(margin, 4) for margin in (best[:, 0] - best[:, 1]).tolist()]
    told = dict(input_ids=ids.tolist(), margins=margins, f32_from_f64=differences)
    (place / "ids.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
