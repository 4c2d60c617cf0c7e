#!/usr/bin/env node
// Streams what a bundle answers to one or more prompts, with transformers.js on the CPU.
//
//     node generate.mjs BUNDLE "Why is the sky blue?" --dtype q4
//
// See README.md beside this file.

import { existsSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";

import { AutoModelForCausalLM, AutoTokenizer, TextStreamer, env } from "@huggingface/transformers";

const DTYPES = ["fp32", "fp16", "q8", "int8", "q4"];
const CHOICES = `[--dtype ${DTYPES.join("|")}] [--max-new-tokens N] [--raw] [--json]`;
const USAGE = `usage: node generate.mjs BUNDLE PROMPT... ${CHOICES}`;
const OPTIONS = {
  dtype: { type: "string" }, // without it, the bundle's default variant
  "max-new-tokens": { type: "string", default: "64" },
  raw: { type: "boolean", default: false }, // continue the text itself, without the chat template
  json: { type: "boolean", default: false }, // a line of JSON with the token ids of each prompt, instead of the text
};

function readArguments() {
  let parsed;
  try {
    parsed = parseArgs({ allowPositionals: true, options: OPTIONS });
  } catch {
    throw new Error(USAGE);
  }
  const { dtype, raw, json, "max-new-tokens": limit } = parsed.values;
  const [bundle, ...prompts] = parsed.positionals;
  const maxNewTokens = Number(limit);
  const isDtypeKnown = dtype === undefined || DTYPES.includes(dtype);
  if (prompts.length === 0 || !isDtypeKnown || !Number.isInteger(maxNewTokens) || maxNewTokens < 1) {
    throw new Error(USAGE);
  }
  if (!existsSync(path.join(bundle, "edgeprune.json"))) {
    throw new Error(`${bundle} has no edgeprune.json; give the folder of a bundle`);
  }
  return { bundle: path.resolve(bundle), prompts, dtype, maxNewTokens, raw, json };
}

/** Tensors of a prompt: as a chat that waits for the assistant where the model has a template, else as plain text. */
function tokenize(tokenizer, prompt, raw) {
  if (raw || !tokenizer.chat_template) {
    return tokenizer(prompt);
  }
  const messages = [{ role: "user", content: prompt }];
  return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
}

async function main() {
  const { bundle, prompts, dtype, maxNewTokens, raw, json } = readArguments();
  env.allowRemoteModels = false;
  const tokenizer = await AutoTokenizer.from_pretrained(bundle);
  const model = await AutoModelForCausalLM.from_pretrained(bundle, dtype ? { dtype } : {});
  for (const prompt of prompts) {
    const inputs = tokenize(tokenizer, prompt, raw);
    const streamer = json ? null : new TextStreamer(tokenizer, { skip_prompt: true });
    const output = await model.generate({ ...inputs, max_new_tokens: maxNewTokens, do_sample: false, streamer });
    if (json) {
      const ids = output.tolist()[0].map(Number);
      const promptTokens = inputs.input_ids.dims[1];
      const { dtype: loaded } = model.sessions.model.config;
      console.log(JSON.stringify({ dtype: loaded, prompt: ids.slice(0, promptTokens), ids: ids.slice(promptTokens) }));
    }
  }
  await model.dispose();
}

try {
  await main();
} catch (error) {
  console.error(error.message);
  process.exitCode = 2;
}
