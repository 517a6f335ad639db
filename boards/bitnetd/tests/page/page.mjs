// The chat page as people meet it, in headless Chromium: it is read, written to by keyboard, stopped, in light and in dark.
// Arguments: the folder of puppeteer-core and axe-core, Chromium's program, the daemon's address, the folder for screenshots.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const [packages, program, url, screenshots] = process.argv.slice(2);
const require = createRequire(join(packages, "node_modules/"));
const { default: puppeteer } = await import(require.resolve("puppeteer-core"));
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

// So long nothing takes on any machine; waiting ends there.
const HANGS = 300_000;
const browser = await puppeteer.launch({
  executablePath: program, protocolTimeout: HANGS,
  // Without a sandbox, because root in a container has none; the one page is ours.
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
const page = await browser.newPage();
page.setDefaultTimeout(HANGS);
const outside = [], errors = [];
page.on("request", (request) => {
  if (!request.url().startsWith(url) && !request.url().startsWith("data:")) outside.push(request.url());
});
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (message) => message.type() === "error" && errors.push(message.text()));

let passed = 0;
async function check(name, f) {
  try {
    await f();
    passed += 1;
    console.log("ok: " + name);
  } catch (error) {
    await picture("failed").catch(() => {});
    console.log("FAILED: " + name + "\n" + error.stack);
    await browser.close();
    process.exit(1);
  }
}
const picture = (name) => page.screenshot({ path: join(screenshots, name + ".png") });
const text = (selector) => page.$eval(selector, (element) => element.innerText);
const focused = () => page.evaluate(() => document.activeElement.id);
// What axe-core finds against WCAG 2.2 A and AA, contrast and names and roles among it. It is put into a world of its own, since the
// page's policy lets no other script in.
async function accessible() {
  const world = await page.mainFrame().isolatedRealm();
  await world.evaluate(axe);
  const found = await world.evaluate(() => {
    const values = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
    return axe.run(document, { runOnly: { type: "tag", values } });
  });
  const what = (rule) => rule.id + ": " + rule.nodes.map((node) => node.target + " " + node.failureSummary).join("; ");
  assert.deepEqual(found.violations.map(what), []);
  // What it could not decide, such as contrast over a gradient, counts as found, but for what is scrolled half out of sight.
  assert.deepEqual(found.incomplete.map(what).filter((what) => !/partially obscured/.test(what)), []);
  assert.ok(found.passes.some((rule) => rule.id === "color-contrast"), "contrast was measured");
}
const replied = () => page.waitForFunction(() => document.querySelector("#log li.assistant:last-child:not([aria-busy]) .cost"));

await page.setViewport({ width: 900, height: 700 });
await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "light" }]);
await page.goto(url + "/", { waitUntil: "load" });

await check("the page opens, names the model and shows the memory", async () => {
  await page.waitForFunction(() => /MiB of memory/.test(document.querySelector("#state").textContent));
  assert.equal(await text("#name"), "stories");
  assert.equal(await focused(), "text");
  await accessible();
  await picture("1-open");
});

await check("a message is sent by Enter and answered word by word", async () => {
  await page.keyboard.type("Tell me a story.");
  await page.keyboard.down("Shift");
  await page.keyboard.press("Enter");
  await page.keyboard.up("Shift");
  assert.equal(await page.$eval("#text", (element) => element.value), "Tell me a story.\n", "Shift and Enter is a new line");
  await page.keyboard.press("Backspace");
  await page.evaluate(() => { max_tokens.value = "40"; seed.value = "1"; });
  await page.keyboard.press("Enter");
  await replied();
  assert.equal(await text("#log li.user p"), "Tell me a story.");
  assert.ok((await text("#log li.assistant p")).length > 20);
  assert.match(await text("#log li.assistant .cost"), /^\d+ tokens · ([\d.]+ tokens\/s · )?[\d.]+ s to the first$/);
  assert.match(await text("#state"), /MiB of memory/);
  assert.equal(await focused(), "text", "the next message can be written at once");
  await accessible();
  await picture("2-answered");
});

await check("in dark", async () => {
  const back = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const light = await back();
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "dark" }]);
  assert.notEqual(await back(), light);
  await accessible();
  await picture("3-dark");
});

await check("Stop, reached by keyboard, stops the daemon's work too", async () => {
  // The model's conversations have no end, and neither has this reply: the token that would end it is put out of reach.
  await page.setRequestInterception(true);
  page.on("request", (request) => {
    const body = request.method() === "POST" && { ...JSON.parse(request.postData()), logit_bias: { 2: -100 } };
    request.continue(body ? { postData: JSON.stringify(body) } : {});
  });
  await page.evaluate(() => { max_tokens.value = "1000000"; });
  await page.keyboard.type("And another one, a long one.");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector("#log li.assistant:last-child p")?.innerText.length > 200);
  await page.keyboard.press("Tab");
  assert.equal(await focused(), "stop", "the next thing after the text that can be used");
  assert.notEqual(await page.$eval("#stop", (element) => getComputedStyle(element).outlineStyle), "none", "focus is seen");
  await picture("4-busy");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => /Stopped\./.test(document.querySelector("#log li.assistant:last-child").innerText));
  assert.equal(await page.$eval("#stop", (element) => element.disabled), true);
  await page.waitForFunction(async () => /^bitnetd_requests_active 0$/m.test(await (await fetch("/metrics")).text()));
  const metrics = await page.evaluate(async () => (await fetch("/metrics")).text());
  assert.match(metrics, /^bitnetd_requests_cancelled_total 1$/m);
  await picture("5-stopped");
});

await check("markup in a message is shown and not obeyed", async () => {
  await page.evaluate(() => { max_tokens.value = "5"; });
  const hostile = "<img src=x onerror=alert(1)><b>bold</b>";
  await page.keyboard.type(hostile);
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll("#log li.assistant").length === 3);
  await replied();
  assert.equal(await text("#log li.user:nth-last-child(2) p"), hostile);
  assert.equal(await page.$("#log img, #log b"), null);
});

await check("settings open by keyboard, have labels and fit a telephone", async () => {
  await page.setViewport({ width: 360, height: 740, deviceScaleFactor: 2 });
  await page.focus("#settings summary");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector("#settings").open);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  assert.equal(wide, 0, "nothing reaches over the side");
  for (const input of await page.$$("input, textarea")) {
    const { role, name } = (await page.accessibility.snapshot({ root: input })) ?? {};
    assert.ok(role && name, "a role and a name: " + (await input.evaluate((element) => element.id)));
  }
  await accessible();
  await picture("6-settings");
});

await check("an error of the daemon is told in its words", async () => {
  await page.evaluate(() => { temperature.value = "9"; form.noValidate = true; });
  await page.focus("#text");
  await page.keyboard.type("Hello");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector("#log li:last-child .error"));
  assert.match(await text("#log li:last-child .error"), /temperature/);
  errors.splice(0, errors.length, ...errors.filter((error) => !/status of 400/.test(error)));
  await picture("7-error");
});

await check("a new conversation begins empty", async () => {
  await page.click("#new");
  assert.equal(await page.$("#log li"), null);
  assert.equal(await page.$eval("#empty", (element) => element.hidden), false);
});

await check("nothing was asked for from outside, and no script failed", () => {
  assert.deepEqual(outside, []);
  assert.deepEqual(errors, []);
});

await browser.close();
console.log(passed + " passed, 0 failed");
