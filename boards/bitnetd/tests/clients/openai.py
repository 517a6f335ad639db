"""OpenAI's client for Python against a running daemon: openai.py URL."""

import json
import re
import sys
import time
import urllib.request

# This file must not be taken for the package.
sys.path = [path for path in sys.path if not path.endswith("tests/clients")]
import openai  # noqa: E402

url = sys.argv[1]
client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell a story."}]
common = {"model": model, "messages": messages, "temperature": 0}
GREEDY = {"max_tokens": 40}


def metric(name):
    text = urllib.request.urlopen(url + "/metrics").read().decode()
    return float(re.search(rf"^{name} (\S+)$", text, re.M).group(1))


def until(what, there):
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def refused(error, **body):
    try:
        client.chat.completions.create(**{**common, **body})
    except error as e:
        return e
    raise AssertionError(f"{body} is answered")


# Chat, whole and streamed, with the same words and counts.
whole = client.chat.completions.create(**common, **GREEDY)
choice = whole.choices[0]
assert choice.message.role == "assistant" and choice.finish_reason == "length"
assert whole.usage.completion_tokens == 40
assert whole.usage.total_tokens == whole.usage.prompt_tokens + 40
chunks = list(client.chat.completions.create(**common, **GREEDY, stream=True, stream_options={"include_usage": True}))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
assert chunks[0].choices[0].delta.role == "assistant"
assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == ["length"]
assert chunks[-1].usage.completion_tokens == 40 and not chunks[-1].choices
assert len({chunk.id for chunk in chunks}) == 1

# Limits, stop texts, probabilities, seeds.
assert client.chat.completions.create(**common, max_completion_tokens=3).usage.completion_tokens == 3
stop = choice.message.content[10:14]
for form in (stop, [stop, "never said"]):
    stopped = client.chat.completions.create(**common, **GREEDY, stop=form).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == choice.message.content.split(stop)[0]
scored = client.chat.completions.create(**common, max_tokens=5, logprobs=True, top_logprobs=3).choices[0].logprobs.content
assert len(scored) == 5 and all(len(token.top_logprobs) == 3 for token in scored)
drawn = {**common, "temperature": 1, "seed": 5, "max_tokens": 20}
assert client.chat.completions.create(**drawn).choices[0].message.content == client.chat.completions.create(**drawn).choices[0].message.content

# Text, and what it is made of.
text = client.completions.create(model=model, prompt="Once upon a time", temperature=0, max_tokens=20)
assert text.choices[0].text.startswith(", there was")
pieces = client.completions.create(model=model, prompt="Once upon a time", temperature=0, max_tokens=20, stream=True)
assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text

# JSON, with and without a schema.
schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
held = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
reply = client.chat.completions.create(**common, max_tokens=200, response_format=held).choices[0]
person = json.loads(reply.message.content)
assert set(person) == {"name", "age"} and len(person["name"]) <= 10 and 0 <= person["age"] <= 99, person
reply = client.chat.completions.create(**common, max_tokens=30, response_format={"type": "json_object"}).choices[0]
assert reply.message.content.startswith("{")

# Errors arrive as the client's own.
assert refused(openai.BadRequestError, n=2).param == "n"
assert refused(openai.BadRequestError, temperature=3).param == "temperature"
assert refused(openai.NotFoundError, model="another").code == "model_not_found"
assert refused(openai.BadRequestError, messages=[{"role": "user", "content": "long " * 5000}]).code == "context_length_exceeded"
try:
    client.embeddings.create(model=model, input="a")
    raise AssertionError("embeddings are answered")
except openai.InternalServerError as e:
    assert e.status_code == 501

# Leaving ends the work. A reply that was done before its client left shows nothing: once of several times is enough to tell.
CANCELLED, FINISHED = "bitnetd_requests_cancelled_total", "bitnetd_requests_finished_total"
cancelled = metric(CANCELLED)
for _ in range(20):
    ended = metric(CANCELLED) + metric(FINISHED)
    stream = client.chat.completions.create(**common, max_tokens=400, stream=True, logit_bias={"2": -100})
    next(iter(stream))
    stream.close()
    until("it ends", lambda: metric(CANCELLED) + metric(FINISHED) > ended)
    if metric(CANCELLED) > cancelled:
        break
assert metric(CANCELLED) == cancelled + 1
print("openai for Python", openai.__version__, "ok")
