// Opens the example page in a real Chromium, asks, and prints as JSON what came back.
//
//     node browser.mjs CHROMIUM URL SCREENSHOT PROMPT... [--tokens N] [--stop] [--software-gpu] [--no-webgpu]
//         [--width N] [--height N]
//
// With --stop the button is pressed as soon as there is a token. With --software-gpu WebGPU has an adapter on machines
// without a GPU: Chromium's own, which computes on the CPU. With --no-webgpu the page sees a browser that does not know
// WebGPU at all.

import { parseArgs } from "node:util";

import { chromium } from "playwright-core";

const LOAD_MS = 400_000;
const ANSWER_MS = 400_000;

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    tokens: { type: "string", default: "24" },
    stop: { type: "boolean", default: false },
    "software-gpu": { type: "boolean", default: false },
    "no-webgpu": { type: "boolean", default: false },
    width: { type: "string", default: "900" },
    height: { type: "string", default: "800" },
  },
});
const [executablePath, url, screenshot, ...prompts] = positionals;
const gpu = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];

// The sandbox needs rights that root in a container lacks; the only page opened is our own.
const args = values["software-gpu"] ? gpu : [];
const browser = await chromium.launch({ executablePath, chromiumSandbox: false, args });
try {
  const page = await browser.newPage({ viewport: { width: Number(values.width), height: Number(values.height) } });
  if (values["no-webgpu"]) {
    await page.addInitScript(() => delete Navigator.prototype.gpu);
  }
  const [problems, requested] = [[], new Set()];
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("requestfailed", (request) => {
    const reason = request.failure().errorText;
    // transformers.js asks for a file to learn its size, and hangs up
    if (reason !== "net::ERR_ABORTED") problems.push(`${request.url()}: ${reason}`);
  });
  page.on("request", (request) => requested.add(request.url()));

  const reached = (state, timeout) =>
    page.waitForFunction((wanted) => [wanted, "error"].includes(document.body.dataset.state), state, { timeout });

  await page.goto(url);
  await reached("ready", LOAD_MS);
  await page.fill("#tokens", values.tokens);
  const answers = [];
  for (const [index, prompt] of prompts.entries()) {
    await page.fill("#prompt", prompt);
    // how often the shown text changes says whether it is streamed
    await page.evaluate(() => {
      window.changes = 0;
      window.observer ??= new MutationObserver(() => (window.changes += 1));
      window.observer.observe(document.getElementById("answers"), { childList: true, subtree: true });
    });
    await page.press("#prompt", "Enter");
    if (values.stop) {
      await page.waitForFunction((place) => document.querySelectorAll(".speed")[place]?.textContent, index);
      await page.click("#stop");
    }
    const ended = `.exchange:nth-of-type(${index + 1})[data-done], [data-state=error]`;
    await page.waitForSelector(ended, { timeout: ANSWER_MS });
    const exchange = page.locator(".exchange").nth(index);
    answers.push({
      prompt: (await exchange.getAttribute("data-prompt-ids"))?.split(" ").map(Number),
      ids: (await exchange.locator(".ids").textContent()).split(" ").map(Number),
      text: await exchange.locator(".text").textContent(),
      speed: await exchange.locator(".speed").textContent(),
      changes: await page.evaluate(() => window.changes),
    });
  }
  await page.screenshot({ path: screenshot });
  const shown = await page.evaluate(() => ({
    state: document.body.dataset.state,
    status: document.getElementById("status").textContent,
    device: document.getElementById("device").value,
    notice: document.getElementById("notice").checkVisibility() ? document.getElementById("notice").textContent : null,
    isIsolated: globalThis.crossOriginIsolated,
  }));
  console.log(JSON.stringify({ ...shown, answers, problems, requested: [...requested] }));
} finally {
  await browser.close();
}
