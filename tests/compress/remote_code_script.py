"""Run by test_checkpoint in a process of its own: loads per-layer folders where no edgeprune can be imported."""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any


class NoEdgeprune(MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] in ("edgeprune", "edgeprune_runtime", "edgeprune_export"):
            raise ModuleNotFoundError(f"{name} is blocked in this process", name=name)


sys.meta_path.insert(0, NoEdgeprune())

import torch  # noqa: E402 - after the blocker, which is the point
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    expected = load_file(folder / f"{name}.expected")
    model = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__name__.startswith("Pruned"), type(model)
    stored = load_file(folder / name / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in stored.items())
    ids = expected["ids"]
    with torch.no_grad():
        output = model(ids[:, :3], use_cache=True)
        steps = [output.logits]
        for position in range(3, ids.shape[1]):
            output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
        torch.testing.assert_close(model(ids).logits, expected["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected["steps"], atol=1e-5, rtol=1e-5)
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens, expected["tokens"])
    sys.stdout.write(name + "\n")
