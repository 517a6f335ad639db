#!/usr/bin/env python
"""Compares a GGUF file that `bitnet-pack export` wrote with the float masters it came from, by another reader: the gguf
   package (0.19.0 used) parses and dequantizes it, numpy makes the masters ternary.
   Run: python -m venv venv && venv/bin/pip install gguf==0.19.0
        target/release/bitnet-pack pack models/stories-ternary -o stories.bitnet --head f16
        target/release/bitnet-pack export stories.bitnet -o stories.gguf
        venv/bin/python tests/golden/check_export.py stories.gguf models/stories-ternary"""
import json, os, sys
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

path, checkpoint = sys.argv[1:]
raw = open(os.path.join(checkpoint, 'model.safetensors'), 'rb').read()
length = int.from_bytes(raw[:8], 'little')
entries = json.loads(raw[8:8 + length])
def tensor(name):
    e = entries[name]; begin, end = (8 + length + o for o in e['data_offsets'])
    bits = np.frombuffer(raw[begin:end], dtype='<u2').astype('<u4') << 16 if e['dtype'] == 'BF16' else raw[begin:end]
    return np.frombuffer(bits.tobytes() if e['dtype'] == 'BF16' else bits, dtype='<f4').reshape(e['shape'])

NAMES = {'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
         'attn_output': 'self_attn.o_proj', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
         'ffn_down': 'mlp.down_proj', 'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
         'attn_sub_norm': 'self_attn.attn_sub_norm', 'ffn_sub_norm': 'mlp.ffn_sub_norm',
         'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm'}
reader = GGUFReader(path)
found = {t.name: t for t in reader.tensors}
values = lambda t: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
linears = 0
for name, t in found.items():
    if name.endswith('.scale'):
        continue
    parts = name.split('.')
    layer = f'model.layers.{parts[1]}.' if parts[0] == 'blk' else ''
    master = tensor(f'{layer}{NAMES[parts[-2]]}.weight')
    ours = values(t)
    if 'proj' not in NAMES[parts[-2]]:
        assert np.array_equal(ours, master.astype('<f2').astype('<f4') if t.tensor_type.name == 'F16' else master), name
        continue
    linears += 1
    mean = np.abs(master.astype('f8')).mean()
    codes = np.clip(np.rint(master * np.float32(1 / np.float32(max(mean, 1e-5)))), -1, 1)
    scale = found[name.replace('.weight', '.scale')].data[0]
    assert abs(scale - mean) <= 1e-6 * mean, (name, scale, mean)
    assert np.array_equal(ours, codes), name
field = lambda key: reader.fields[key].contents()
tokens, kinds = field('tokenizer.ggml.tokens'), field('tokenizer.ggml.token_type')
theirs = json.load(open(os.path.join(checkpoint, 'tokenizer.json')))['model']['vocab']
assert all(tokens[i] == text for text, i in theirs.items()), [(i, tokens[i], t) for t, i in theirs.items() if tokens[i] != t][:5]
print(f"{path}: {field('general.architecture')}, {len(found)} tensors, {linears} linears ternary as the masters, "
      f"{len(tokens)} tokens as in tokenizer.json")
