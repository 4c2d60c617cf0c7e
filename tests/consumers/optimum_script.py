"""Run by the Python of Optimum's environment: greedy tokens of batches of prompts, as JSON.

python optimum_script.py BUNDLE FILE_OF_ONNX_FOLDER < {"batches": [[[1, 2], [3]]], "new_tokens": 8, "padding": 0}
"""

import json
import sys
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main() -> None:
    bundle, file = sys.argv[1:]
    wanted = json.load(sys.stdin)
    model = ORTModelForCausalLM.from_pretrained(bundle, subfolder="onnx", file_name=file, local_files_only=True)
    found = [written(model, rows, wanted["new_tokens"], wanted["padding"]) for rows in wanted["batches"]]
    sys.stdout.write(json.dumps(found))


def written(model: Any, rows: list[list[int]], new_tokens: int, padding: int) -> list[list[int]]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):  # padded before the tokens, as transformers generates
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    tokens = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=padding
    )
    found: list[list[int]] = tokens[:, width:].tolist()
    return found


if __name__ == "__main__":
    main()
