#!/usr/bin/env python3
"""Makes a small random checkpoint of the MatMul-free language model, and what PyTorch computes of it.

  python matmul_free.py matmul_free

Scalable MatMul-free Language Modeling (arXiv 2406.02528) as the published models compute it (class HGRNBitForCausalLM): an
elementwise recurrence in place of attention, and ternary linears that normalize their own input, the head's too. Written from
the equations; float32, token by token.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN, FFN, LAYERS, TOKENS = 128, 48, 80, 3, 48
EPS = 1e-6


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * (x * (1 / (x.square().mean() + EPS).sqrt()))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


class BitLinear:
    def __init__(self, tensors: dict[str, Tensor], name: str):
        w = tensors[f"{name}.weight"].float()
        self.gain = tensors[f"{name}.norm.weight"].float()
        self.scale = w.abs().mean().clamp(min=1e-5)
        self.signs = (w * (1 / self.scale)).round().clamp(-1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        x = rms(x, self.gain)
        s = 127 / x.abs().max().clamp(min=1e-5)
        return self.signs @ (x * s).round().clamp(-128, 127) * self.scale / s


@torch.no_grad()
def logits(tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    vector = lambda name: tensors[f"model.{name}"].float()
    shares = vector("lower_bounds").softmax(0)
    bounds = shares.cumsum(0) - shares[0]
    state = torch.zeros(LAYERS, HIDDEN)
    rows = []
    for token in ids:
        x = vector("embeddings.weight")[token]
        for layer in range(LAYERS):
            name = f"layers.{layer}"
            linear = lambda part: BitLinear(tensors, f"model.{name}.{part}")
            n = rms(x, vector(f"{name}.attn_norm.weight"))
            forget = linear("attn.f_proj")(n).sigmoid()
            forget = bounds[layer] + (1 - bounds[layer]) * forget
            taken = silu(linear("attn.i_proj")(n)) * (1 - forget)
            state[layer] = forget * state[layer] + taken
            # The norm is that of the gate, and the activation is of the state.
            gate = rms(linear("attn.g_proj")(n), vector(f"{name}.attn.g_norm.weight"))
            x = x + linear("attn.o_proj")(gate * silu(state[layer]))
            gate, up = linear("mlp.gate_proj")(rms(x, vector(f"{name}.mlp_norm.weight"))).split(FFN)
            x = x + linear("mlp.down_proj")(silu(gate) * up)
        rows.append(BitLinear(tensors, "lm_head")(rms(x, vector("norm.weight"))))
    return torch.stack(rows)


def main() -> None:
    torch.manual_seed(7)
    torch.set_num_threads(1)
    tensors = {"model.lower_bounds": torch.randn(LAYERS, HIDDEN), "model.embeddings.weight": torch.randn(VOCAB, HIDDEN)}

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(width)

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = (0.1 * torch.randn(rows, columns)).bfloat16()
        norm(f"{name}.norm", columns)

    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for name in ("attn_norm", "mlp_norm", "attn.g_norm"):
            norm(f"{layer}.{name}", HIDDEN)
        for name in ("i_proj", "f_proj", "g_proj", "o_proj"):
            linear(f"{layer}.attn.{name}", HIDDEN, HIDDEN)
        linear(f"{layer}.mlp.gate_proj", 2 * FFN, HIDDEN)
        # Gate and up have one scale: that of both together.
        tensors[f"{layer}.mlp.gate_proj.weight"][FFN:] *= 1.5
        linear(f"{layer}.mlp.down_proj", HIDDEN, FFN)
    norm("model.norm", HIDDEN)
    linear("lm_head", VOCAB, HIDDEN)
    tensors["model.embeddings.weight"] = tensors["model.embeddings.weight"].bfloat16()

    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architectures=["HGRNBitForCausalLM"],
        attn_mode="fused_recurrent",
        bos_token_id=1,
        conv_size=4,
        eos_token_id=2,
        expand_ratio=1,
        fuse_cross_entropy=True,
        hidden_act="swish",
        hidden_ratio=4,
        hidden_size=HIDDEN,
        initializer_range=0.02,
        intermediate_size=FFN,
        max_position_embeddings=512,
        model_type="hgrn_bit",
        num_heads=1,
        num_hidden_layers=LAYERS,
        rms_norm_eps=EPS,
        share_conv_kernel=True,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        use_cache=True,
        use_lower_bound=True,
        use_short_conv=False,
        vocab_size=VOCAB,
    )
    (place / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    ids = torch.randint(0, VOCAB, (TOKENS,)).tolist()
    (place / "ids.json").write_text(json.dumps(dict(input_ids=[ids])) + "\n")
    np.save(place / "logits_f32.npy", logits(tensors, ids).numpy())


if __name__ == "__main__":
    main()
