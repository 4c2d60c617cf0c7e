// The page: says what the bundle is, sends prompts to the worker that runs the model, shows the text as it comes.

const MANIFEST = "bundle/edgeprune.json";
// How a graph's file name ends -> what transformers.js calls that variant (its `dtype`).
const DTYPES = { "": "fp32", _fp16: "fp16", _quantized: "q8", _int8: "int8", _q4: "q4" };
const DEVICES = { wasm: "CPU (WebAssembly)", webgpu: "GPU (WebGPU, not verified)" };
// Why WebGPU is not there: a page that came over plain http from another machine is not told of it.
const NO_WEBGPU = "This browser has no WebGPU here";
const NO_ADAPTER = "This browser's WebGPU finds no graphics adapter";

const element = (id) => document.getElementById(id);
const chosen = new URLSearchParams(location.search);

let worker;
// A worker that computes reads no messages; a shared number reaches it all the same, where the server allows one.
const stop = globalThis.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : null;

function setState(state) {
  document.body.dataset.state = state;
  element("send").disabled = state !== "ready";
  element("variant").disabled = element("device").disabled = state === "generating";
  element("stop").hidden = state !== "generating" || stop === null;
}

function fail(message) {
  setState("error");
  element("status").textContent = message;
}

const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e7 ? 1 : 0 })} MB`;
const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
const millions = (count) => (count < 1e6 ? `${(count / 1e3).toFixed(0)} K` : `${(count / 1e6).toFixed(1)} M`);

function variantSize(manifest, variant) {
  return [variant.graph, ...variant.data].reduce((bytes, file) => bytes + manifest.files[file].size_bytes, 0);
}

function dtypeOf(variant) {
  const suffix = /^onnx\/model(_\w+)?\.onnx$/.exec(variant.graph)?.[1] ?? "";
  return DTYPES[suffix];
}

function option(value, label) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = label;
  return made;
}

function describe(manifest) {
  element("name").textContent = document.title = manifest.model.name;
  const ratio = manifest.plan?.ratio_reached;
  const facts = [
    `${millions(manifest.parameters.all)} parameters`,
    ratio ? `${(100 * ratio).toFixed(0)} % pruned away` : null,
    `${manifest.layers.length} layers`,
    `${manifest.context_tokens.toLocaleString("en")} tokens of context`,
  ];
  const items = facts.filter(Boolean).map((fact) => Object.assign(document.createElement("li"), { textContent: fact }));
  element("facts").replaceChildren(...items);
  const variants = Object.entries(manifest.variants).map(([name, variant]) =>
    option(name, `${name}, ${megabytes(variantSize(manifest, variant))}`),
  );
  element("variant").replaceChildren(...variants);
  const wanted = chosen.get("variant");
  element("variant").value = Object.hasOwn(manifest.variants, wanted) ? wanted : manifest.default_variant;
}

/** Fill the list of devices; what was asked for by the address or, without it, by the bundle's target is chosen. */
async function offerDevices(manifest) {
  const adapter = await navigator.gpu?.requestAdapter();
  const devices = adapter ? ["wasm", "webgpu"] : ["wasm"];
  const wanted = chosen.get("device") ?? manifest.target;
  element("device").replaceChildren(...devices.map((name) => option(name, DEVICES[name])));
  element("device").value = devices.includes(wanted) ? wanted : "wasm";
  if (wanted === "webgpu" && !adapter) {
    const reason = navigator.gpu ? NO_ADAPTER : NO_WEBGPU;
    element("notice").textContent = `${reason}: the model runs on the CPU instead.`;
    element("notice").hidden = false;
  }
}

function load(manifest) {
  setState("loading");
  worker?.terminate();
  const name = element("variant").value;
  const variant = manifest.variants[name];
  const total = variantSize(manifest, variant);
  element("progress").value = 0;
  element("status").textContent = `Loading ${name}`;
  worker = new Worker("worker.js", { type: "module" });
  worker.onerror = (event) => fail(event.message || "the worker could not be started");
  worker.onmessage = ({ data }) => handlers[data.type](data);
  const handlers = {
    progress({ loaded }) {
      element("progress").value = Math.min(1, loaded / total);
      const share = `${megabytes(loaded)} of ${megabytes(total)}`;
      element("status").textContent = loaded < total ? `Loading ${name}: ${share}` : `Preparing ${name}`;
    },
    ready({ seconds, threads }) {
      element("progress").value = 1;
      const workers = element("device").value === "wasm" ? `, ${counted(threads, "thread")}` : "";
      element("status").textContent = `${name} ready after ${seconds.toFixed(1)} s${workers}`;
      setState("ready");
      element("prompt").focus();
    },
    error({ message }) {
      fail(message);
    },
  };
  worker.postMessage({ type: "load", dtype: dtypeOf(variant), device: element("device").value, stop });
}

function ask(prompt, maxNewTokens) {
  setState("generating");
  const exchange = element("exchange").content.cloneNode(true).firstElementChild;
  const parts = [".question", ".text", ".speed", "details", ".ids"].map((name) => exchange.querySelector(name));
  const [question, text, speed, details, ids] = parts;
  question.textContent = prompt;
  element("answers").append(exchange);
  exchange.scrollIntoView({ block: "end" });
  const handlers = {
    text({ piece }) {
      text.textContent += piece;
      exchange.scrollIntoView({ block: "end" });
    },
    speed({ tokens, tokensPerSecond }) {
      speed.textContent = `${counted(tokens, "token")}, ${tokensPerSecond.toFixed(1)} tokens/s`;
    },
    done({ promptIds, newIds, tokensPerSecond, firstTokenSeconds }) {
      const rate = newIds.length > 1 ? `, ${tokensPerSecond.toFixed(1)} tokens/s` : "";
      const first = `the first after ${firstTokenSeconds.toFixed(2)} s (prompt: ${counted(promptIds.length, "token")})`;
      speed.textContent = `${counted(newIds.length, "token")}${rate}, ${first}`;
      ids.textContent = newIds.join(" ");
      exchange.dataset.promptIds = promptIds.join(" ");
      exchange.dataset.done = "";
      details.hidden = false;
      setState("ready");
      exchange.scrollIntoView({ block: "end" });
    },
    error({ message }) {
      fail(message);
    },
  };
  worker.onmessage = ({ data }) => handlers[data.type](data);
  worker.postMessage({ type: "generate", prompt, maxNewTokens });
}

async function start() {
  const response = await fetch(MANIFEST);
  if (!response.ok) {
    throw new Error(`${MANIFEST} was not found; put a bundle into the folder "bundle", or use serve.py`);
  }
  const manifest = await response.json();
  describe(manifest);
  await offerDevices(manifest);
  for (const id of ["variant", "device"]) {
    element(id).addEventListener("change", () => load(manifest));
  }
  element("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const prompt = element("prompt").value.trim();
    if (document.body.dataset.state === "ready" && prompt) {
      element("prompt").value = "";
      ask(prompt, element("tokens").valueAsNumber);
    }
  });
  element("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      element("form").requestSubmit();
    }
  });
  element("stop").addEventListener("click", () => Atomics.store(stop, 0, 1));
  load(manifest);
}

start().catch((error) => fail(error.message));
