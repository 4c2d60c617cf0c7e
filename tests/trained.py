"""A really trained model and text to fit and to judge it on, for claims that random weights cannot bear."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def stories(stories260k: Path, data_folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The small Llama of stories in float32, and windows of 256 tokens: 96 to fit on, 48 others to judge on."""
    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    lines = (data_folder / "text" / "tinystories_train_sample.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = torch.tensor([token for line in lines for token in tokenizer(json.loads(line)["text"]).input_ids])
    windows = tokens[: len(tokens) // 256 * 256].view(-1, 256)
    fitting, judging = windows[:96], windows[len(windows) // 2 :][:48]
    return model, fitting, judging
