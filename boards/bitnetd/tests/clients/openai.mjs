// OpenAI's client for JavaScript against a running daemon: openai.mjs PACKAGE URL.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [folder, url] = process.argv.slice(2);
const OpenAI = createRequire(folder + "/")("openai");
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const common = { model, messages: [{ role: "user", content: "Tell a story." }], temperature: 0, max_tokens: 40 };
const create = (body) => client.chat.completions.create({ ...common, ...body });

async function metric(name) {
  const text = await (await fetch(url + "/metrics")).text();
  return Number(text.match(new RegExp("^" + name + " (\\S+)$", "m"))[1]);
}

// Chat, whole and streamed.
const whole = await create({});
const words = whole.choices[0].message.content;
assert.equal(whole.usage.completion_tokens, 40);
let streamed = "", ends = [], usage = null;
for await (const chunk of await create({ stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  if (chunk.choices[0]?.finish_reason) ends.push(chunk.choices[0].finish_reason);
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, words);
assert.deepEqual([ends, usage.completion_tokens], [["length"], 40]);

// Stop texts.
const stop = words.slice(10, 14);
const stopped = (await create({ stop })).choices[0];
assert.deepEqual([stopped.finish_reason, stopped.message.content], ["stop", words.split(stop)[0]]);

// JSON by a schema.
const schema = { type: "object", properties: { ok: { type: "boolean" } }, required: ["ok"], additionalProperties: false };
const held = await create({ response_format: { type: "json_schema", json_schema: { name: "x", strict: true, schema } } });
assert.equal(typeof JSON.parse(held.choices[0].message.content).ok, "boolean");

// Errors.
await assert.rejects(create({ n: 2 }), (e) => e instanceof OpenAI.BadRequestError && e.param === "n");
await assert.rejects(create({ model: "another" }), (e) => e instanceof OpenAI.NotFoundError);

// Leaving. A reply that was done before its client left shows nothing: once of several times is enough to tell.
const names = ["bitnetd_requests_cancelled_total", "bitnetd_requests_finished_total"];
const [cancelled, finished] = await Promise.all(names.map(metric));
for (let i = 1; i <= 20; i++) {
  const stream = await create({ stream: true, max_tokens: 400, logit_bias: { 2: -100 } });
  for await (const _ of stream) break;
  stream.controller.abort();
  let ended;
  do ended = await Promise.all(names.map(metric)); while (ended[0] + ended[1] < cancelled + finished + i);
  if (ended[0] > cancelled) break;
}
assert.equal(await metric(names[0]), cancelled + 1);
console.log("openai for JavaScript ok");
