"""Checkpoints in Hugging Face's layout, which `bitnet-pack` reads, and masters to train on with.

Linears are written as they are multiplied: each matrix has one magnitude (rounded to bf16) and perhaps zeros, which the packer
recognises. What structured sparsity left out is rows and columns of zeros.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from linear import BitLinear
from memory import bounded
from model import EPS, LINEARS, Config, Model


def save(model: Model, directory: Path) -> None:
    """Writes `config.json`, `model.safetensors` for the packer and `masters.safetensors` for training."""
    directory.mkdir(parents=True, exist_ok=True)
    c = model.c
    linears = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    tensors = {}
    for name, value in model.state_dict().items():
        if name in linears:
            with torch.no_grad():
                value = linears[name].quantized()
        elif name.endswith((".tau", ".alpha", ".live_rows", ".live_columns")):
            continue
        elif name.endswith(".bound"):
            # The last step may have left the range into which the next pass would have brought it back.
            value = bounded(value)
        tensors["model." + name] = value.detach().to(torch.bfloat16 if value.dim() > 1 and "taps" not in name else torch.float32).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architectures=["BitNetForCausalLM"],
        model_type="bitnet",
        vocab_size=c.vocab,
        hidden_size=c.hidden,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        hidden_act="relu2",
        rms_norm_eps=EPS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        rope_theta=c.theta,
        torch_dtype="bfloat16",
        quantization_config=dict(quant_method="bitnet", quantization_mode="values"),
    )
    if c.window:
        config |= dict(sliding_window=c.window, sink_tokens=c.sinks)
    match c.memory:
        case {"heads": heads, "width": width}:
            config["memory"] = dict(kind="bitrnn-m", heads=heads, key_dim=width, value_dim=width)
        case {"numbers": numbers}:
            config["memory"] = dict(kind="bitrnn-v", width=numbers)
        case {"shared": _}:
            config["memory"] = dict(kind="shared")
    if c.memory:
        config["memory"]["write_delay"] = c.window if c.delayed_writes else 0
    if c.activations:
        config["activation_quantization"] = c.activations
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_masters(model, directory)


def save_masters(model: Model, directory: Path) -> None:
    save_file({k: v.clone() for k, v in model.state_dict().items()}, directory / "masters.safetensors")
    (directory / "train.json").write_text(json.dumps(model.c.to_json(), indent=1) + "\n")


def save_memories(model: Model, source: Path, directory: Path) -> None:
    """What `bitnet-pack convert` wrote to `source`, with the memories of `model`: all else stays as it is, bit for bit."""
    directory.mkdir(parents=True, exist_ok=True)
    state = load_file(source / "model.safetensors")
    linears = {f"model.{name}.weight": m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    are_values = are_values_of(json.loads((source / "config.json").read_text()))
    for name, value in model.state_dict(prefix="model.").items():
        if ".memory." in name and name in state:
            if name in linears and are_values:
                with torch.no_grad():
                    value = linears[name].quantized()
            state[name] = (bounded(value) if name.endswith(".bound") else value).to("cpu", state[name].dtype)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    save_masters(model, directory)


def are_values_of(config: dict) -> bool:
    """Whether linears are written as they are multiplied."""
    return config.get("quantization_config", {}).get("quantization_mode") == "values"


def load(directory: Path) -> Model:
    """The model whose masters are there."""
    model = Model(Config(**json.loads((directory / "train.json").read_text())))
    state = load_file(directory / "masters.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            module.live_rows, module.live_columns = state[f"{name}.live_rows"], state[f"{name}.live_columns"]
    model.load_state_dict(state)
    return model


def described(directory: Path) -> Model:
    """The model of `config.json`, if it is one that this recipe has, with the weights that lie beside it."""
    config = json.loads((directory / "config.json").read_text())
    match config.get("memory"):
        case None:
            memory = {}
        case {"kind": "bitrnn-m", "heads": heads, "key_dim": width, "value_dim": height} if width == height:
            memory = dict(heads=heads, width=width)
        case {"kind": "bitrnn-v", "width": numbers}:
            memory = dict(numbers=numbers)
        case {"kind": "shared"}:
            memory = dict(shared=1)
        case other:
            raise SystemExit(f"{directory}: a memory that is neither square matrices, a vector nor shared: {other}")
    if config["architectures"] != ["BitNetForCausalLM"]:
        raise SystemExit(f"{directory}: not a BitNetForCausalLM")
    if config["rms_norm_eps"] != EPS or not config.get("tie_word_embeddings"):
        raise SystemExit(f"{directory}: only models with rms_norm_eps = {EPS} and tied embeddings are trained here")
    are_values = are_values_of(config)
    model = Model(
        Config(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            ffn=config["intermediate_size"],
            theta=config["rope_theta"],
            window=config.get("sliding_window", 0),
            sinks=config.get("sink_tokens", 0),
            memory=memory,
            delayed_writes=config.get("memory", {}).get("write_delay", 0) != 0,
            activations=config.get("activation_quantization", {}),
            weights={name: "values" for name in LINEARS} if are_values else {},
        )
    )
    adopt(model, directory / "model.safetensors")
    return model


def exported(directory: Path) -> Model:
    """The model as the packer sees it: what it computes is what the runtime must."""
    model = described(directory)
    if are_values_of(json.loads((directory / "config.json").read_text())):
        for linear in (m for m in model.modules() if isinstance(m, BitLinear)):
            linear.kind = "values"
    return model


def converted(directory: Path) -> Model:
    """The model that `bitnet-pack convert --to-stateful` wrote, whose linears are floats."""
    model = described(directory)
    if not model.c.memory:
        raise SystemExit(f"{directory}: nothing beside attention; `bitnet-pack convert --to-stateful` puts it there")
    return model


def adopt(model: Model, path: Path) -> None:
    """Gives `model` the weights of another that it shares a shape with; what that one has not keeps its initial value."""
    state = load_file(path)
    state = {k.removeprefix("model."): v.float() for k, v in state.items() if not k.endswith((".live_rows", ".live_columns"))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    new = (".tau", ".alpha", ".live_rows", ".live_columns")
    wrong = [k for k in missing if ".memory." not in k and not k.endswith(new)] + unexpected
    if wrong:
        raise SystemExit(f"{path}: not the weights of this model: {', '.join(wrong)}")
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.fit_scale()
