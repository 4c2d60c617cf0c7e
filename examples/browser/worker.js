// Loads the bundle with transformers.js and generates, away from the page's thread, which would freeze meanwhile.

import {
  AutoModelForCausalLM,
  AutoTokenizer,
  StoppingCriteria,
  TextStreamer,
  env,
} from "./node_modules/@huggingface/transformers/dist/transformers.min.js";

const HERE = new URL("./", import.meta.url);
const RUNTIME = new URL("node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded", HERE).href;
// More threads than this win next to nothing for one sequence, and a page is not alone on its machine.
const MAX_THREADS = 4;

let tokenizer, model, stop;

/** All from this server, and each time anew: a cached copy would outlive a bundle that was made again. */
function useLocalFiles(device) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = HERE.pathname;
  env.useBrowserCache = false;
  env.useWasmCache = false;
  const { wasm } = env.backends.onnx;
  // WebGPU needs the larger build, whose functions can wait for the GPU.
  const build = device === "webgpu" ? ".asyncify" : "";
  wasm.wasmPaths = { mjs: `${RUNTIME}${build}.mjs`, wasm: `${RUNTIME}${build}.wasm` };
  // Threads share memory, which browsers allow to pages with the headers COOP and COEP alone (see serve.py).
  wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  return wasm.numThreads;
}

async function load({ dtype, device, stop: shared }) {
  const start = performance.now();
  stop = shared;
  const threads = useLocalFiles(device);
  const loaded = {};
  const progress_callback = (event) => {
    if (event.status === "progress" && event.file.startsWith("onnx/")) {
      loaded[event.file] = event.loaded;
      postMessage({ type: "progress", loaded: Object.values(loaded).reduce((sum, bytes) => sum + bytes, 0) });
    }
  };
  tokenizer = await AutoTokenizer.from_pretrained("bundle");
  model = await AutoModelForCausalLM.from_pretrained("bundle", { dtype, device, progress_callback });
  postMessage({ type: "ready", threads, seconds: (performance.now() - start) / 1000 });
}

class StopButton extends StoppingCriteria {
  _call(sequences) {
    return sequences.map(() => stop !== null && Atomics.load(stop, 0) === 1);
  }
}

/** Tensors of a prompt: as a chat that waits for the assistant where the model has a template, else as plain text. */
function tokenize(prompt) {
  if (!tokenizer.chat_template) {
    return tokenizer(prompt);
  }
  const messages = [{ role: "user", content: prompt }];
  return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
}

async function generate({ prompt, maxNewTokens }) {
  if (stop !== null) {
    Atomics.store(stop, 0, 0);
  }
  const inputs = tokenize(prompt);
  const start = performance.now();
  let [tokens, first, last] = [0, start, start];
  const tokensPerSecond = () => (tokens - 1) / ((last - first) / 1000 || Infinity);
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    callback_function: (piece) => postMessage({ type: "text", piece }),
    token_callback_function: () => {
      last = performance.now();
      first = tokens++ ? first : last;
      postMessage({ type: "speed", tokens, tokensPerSecond: tokensPerSecond() });
    },
  });
  const output = await model.generate({
    ...inputs,
    max_new_tokens: maxNewTokens,
    do_sample: false,
    streamer,
    stopping_criteria: new StopButton(),
  });
  const ids = output.tolist()[0].map(Number);
  const promptTokens = inputs.input_ids.dims[1];
  postMessage({
    type: "done",
    promptIds: ids.slice(0, promptTokens),
    newIds: ids.slice(promptTokens),
    tokensPerSecond: tokensPerSecond(),
    firstTokenSeconds: (first - start) / 1000,
  });
}

const tasks = { load, generate };

self.onmessage = async ({ data }) => {
  try {
    await tasks[data.type](data);
  } catch (error) {
    // ONNX Runtime throws bare numbers where WebAssembly ran out of memory.
    postMessage({ type: "error", message: error instanceof Error ? error.message : `ONNX Runtime failed: ${error}` });
  }
};
