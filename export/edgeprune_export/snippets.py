"""How each runtime loads a bundle: the one place of the code that a model card shows, which tests run.

In the code the word BUNDLE stands for the folder, and the names of `_values` stand behind a dollar sign.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from edgeprune_export.targets import Target
from edgeprune_runtime.bundle import Manifest, transformers_js_dtype

OPTIMUM = "optimum"
# What optimum-onnx 0.1.0 reads of a config; of other types it takes the number of query heads and hidden_size / heads.
OPTIMUM_READS_HEAD_DIM = frozenset({"gemma", "gemma3_text", "gpt_oss", "nemotron"})
OPTIMUM_READS_KV_HEADS = frozenset(
    {
        *("arcee", "cohere", "deepseek_v3", "gemma", "gemma3_text", "glm", "gpt_oss", "granite", "helium", "llama"),
        *("mistral", "nemotron", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
    }
)

SNIPPET_TOKENS = 256
"""Prompt and answer of the snippets together, at most."""

LM_EVAL_TOKENS = 1024


@dataclass(frozen=True)
class Snippet:
    """How one runtime loads a bundle.

    `chat` is the code for models with a chat template, None where `code` serves both. A snippet without a title belongs
    to the one before it.
    """

    title: str
    install: str
    language: str
    code: str
    chat: str | None = None
    remark: str = ""


SNIPPETS: Mapping[str, Snippet] = {
    "edgeprune": Snippet(
        "edgeprune",
        "pip install edgeprune",
        "sh",
        """\
edgeprune doctor BUNDLE$provider_option
edgeprune run BUNDLE$provider_option --prompt "What is water?"
""",
        remark="`edgeprune validate BUNDLE` checks that it computes what it should, without torch. In Python:",
    ),
    "edgeprune-python": Snippet(
        "",
        "",
        "python",
        """\
from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.generate import Generation
from edgeprune_runtime.session import Decoder
from edgeprune_runtime.tokenizer import Tokenizer

bundle = open_bundle("BUNDLE")
tokenizer = Tokenizer.load(bundle)
prompt = tokenizer.encode("Water is")
print(tokenizer.decode(list(Generation(Decoder(bundle$provider_argument), prompt, max_new_tokens=64))))
""",
        """\
from edgeprune_runtime.bundle import open_bundle
from edgeprune_runtime.generate import Generation
from edgeprune_runtime.session import Decoder
from edgeprune_runtime.tokenizer import Tokenizer

bundle = open_bundle("BUNDLE")
tokenizer = Tokenizer.load(bundle)
prompt = tokenizer.encode_chat([{"role": "user", "content": "What is water?"}])
print(tokenizer.decode(list(Generation(Decoder(bundle$provider_argument), prompt, max_new_tokens=64))))
""",
    ),
    "onnxruntime-genai": Snippet(
        "onnxruntime-genai",
        "pip install 'onnxruntime-genai>=0.15'",
        "python",
        """\
import onnxruntime_genai as og

model = og.Model("BUNDLE")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens=True)
params = og.GeneratorParams(model)
params.set_search_options(max_length=$max_length)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Water is"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
""",
        """\
import onnxruntime_genai as og

model = og.Model("BUNDLE")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=$max_length)
generator = og.Generator(model, params)
messages = '[{"role": "user", "content": "What is water?"}]'
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
generator.append_tokens(tokenizer.encode(prompt))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
""",
        remark="It allocates the KV cache of `max_length` tokens at once.",
    ),
    "transformers.js": Snippet(
        "transformers.js",
        "npm install @huggingface/transformers",
        "js",
        """\
import { pipeline } from "@huggingface/transformers";

const generate = await pipeline("text-generation", "BUNDLE", { ${device}dtype: "$dtype" });
const [{ generated_text }] = await generate("Water is", { max_new_tokens: 64 });
console.log(generated_text);
""",
        """\
import { pipeline } from "@huggingface/transformers";

const generate = await pipeline("text-generation", "BUNDLE", { ${device}dtype: "$dtype" });
const messages = [{ role: "user", content: "What is water?" }];
const [{ generated_text }] = await generate(messages, { max_new_tokens: 64 });
console.log(generated_text.at(-1).content);
""",
        remark="In Node.js a path has to begin with `/` or `./`; in a browser it is a hub id or a served folder.",
    ),
    "lm-eval": Snippet(
        "lm-evaluation-harness",
        "pip install 'lm-eval>=0.4.13'",
        "sh",
        """\
lm_eval --model onnxruntime --model_args pretrained=BUNDLE,max_length=$lm_eval_length --tasks lambada_openai
lm_eval --model onnxruntime-genai --model_args pretrained=BUNDLE,max_length=$lm_eval_length --tasks lambada_openai
""",
        remark="Its ONNX backends put no token before a text; `edgeprune eval` does where the tokenizer does.",
    ),
    "onnxruntime": Snippet(
        "onnxruntime alone",
        "pip install onnxruntime tokenizers",
        "python",
        """\
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("BUNDLE/tokenizer.json")
session = ort.InferenceSession("BUNDLE/$graph")
ids = np.array([tokenizer.encode("Water is").ids])
mask = np.ones_like(ids)
sizes = {"batch_size": 1, "past_sequence_length": 0}
caches = [node for node in session.get_inputs() if node.name.startswith("past_key_values.")]
past = {node.name: np.zeros([sizes.get(size, size) for size in node.shape], np.$kv_dtype) for node in caches}
answer = []
for _ in range(16):
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **past})
    ids = logits[:, -1:].argmax(-1)
    answer.append(int(ids[0, 0]))
    mask = np.append(mask, [[1]], axis=1)
    past = dict(zip(past, present))
print(tokenizer.decode(answer))
""",
    ),
    OPTIMUM: Snippet(
        "Optimum",
        "pip install 'optimum-onnx[onnxruntime]==0.1.0'",
        "python",
        """\
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import PreTrainedTokenizerFast

model = ORTModelForCausalLM.from_pretrained("BUNDLE", subfolder="onnx", file_name="$file")
tokenizer = PreTrainedTokenizerFast.from_pretrained("BUNDLE")
inputs = tokenizer("Water is", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
""",
        remark="It wants transformers before 4.58, so an environment of its own.",
    ),
}
"""Runtime -> its code in a card, in the order of the card."""


def snippets(manifest: Manifest, *, has_chat: bool = False) -> dict[str, str]:
    """The code of each runtime that can load a bundle, as its card shows it; BUNDLE stands for the folder."""
    values = _values(manifest)
    return {
        name: Template(snippet.chat if has_chat and snippet.chat else snippet.code).substitute(values)
        for name, snippet in SNIPPETS.items()
        if name != OPTIMUM or optimum_obstacle(manifest) is None
    }


def optimum_obstacle(manifest: Manifest) -> str | None:
    """Why Optimum's ORTModelForCausalLM cannot load a bundle; None if it can.

    It works the shapes of the KV cache out of `config.json` by a rule of its own, and does not look at the graph.
    """
    layers, model_type = manifest.layers, manifest.model.model_type
    if len({(layer.heads, layer.kv_heads, layer.head_dim) for layer in layers}) > 1:
        return "it takes the same head counts for all layers, and here they differ"
    layer = layers[0]
    head_dim = manifest.hidden_size // layer.heads
    if model_type not in OPTIMUM_READS_HEAD_DIM and head_dim != layer.head_dim:
        return f"it takes hidden_size / heads = {head_dim} for head_dim, which is {layer.head_dim} here"
    if model_type not in OPTIMUM_READS_KV_HEADS and layer.kv_heads != layer.heads:
        return (
            f"of this model type it takes as many KV heads as query heads, {layer.heads}, and here are {layer.kv_heads}"
        )
    return None


def _values(manifest: Manifest) -> dict[str, str]:
    """What the dollar signs of the snippets stand for."""
    name = manifest.default_variant
    graph = manifest.variants[name].graph
    provider = "cpu" if manifest.target is None else Target.find(manifest.target).provider
    is_on_cpu = provider == "cpu"
    return {
        "provider_option": "" if is_on_cpu else f" --provider {provider}",
        "provider_argument": "" if is_on_cpu else f', provider="{provider}"',
        "device": 'device: "webgpu", ' if provider == "webgpu" else "",
        "graph": graph,
        "file": Path(graph).name,
        "dtype": transformers_js_dtype(name),
        "kv_dtype": "float16" if name == "fp16" else "float32",
        "max_length": str(min(SNIPPET_TOKENS, manifest.context_tokens)),
        "lm_eval_length": str(min(LM_EVAL_TOKENS, manifest.context_tokens)),
    }
