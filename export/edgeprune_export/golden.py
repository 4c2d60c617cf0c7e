"""Golden sequences for a device without torch: a few of the torch model's logits, and its greedy continuations."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from edgeprune_export.positions import context_tokens
from edgeprune_export.reference import continue_greedily, logits_of
from edgeprune_export.sample_text import windows
from edgeprune_runtime.golden import GoldenCase
from edgeprune_runtime.session import Ids

# A row of logits takes 4 bytes x vocabulary (0.2 MB for 49,152 entries), so there are few: the first position, where
# nothing can be attended to, one in the middle, and the last.
CASES = 4
LENGTH_TOKENS = 96
GREEDY_TOKENS = 8


def golden_cases(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[GoldenCase]:
    """Golden cases from windows of the sequences."""
    return [_case(model, ids) for ids in golden_texts(sequences, context_tokens(model.config))]


def golden_texts(sequences: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    """The texts of the cases.

    Raises:
        EdgepruneError: if the sequences hold too few tokens.
    """
    return windows(sequences, count=CASES, tokens=min(LENGTH_TOKENS, context - GREEDY_TOKENS))


def golden_positions(ids: Sequence[int]) -> Ids:
    """The positions of a text whose logits are kept, (P,) int64."""
    return np.unique(np.array([0, len(ids) // 2, len(ids) - 1], np.int64))


def _case(model: PreTrainedModel, ids: Sequence[int]) -> GoldenCase:
    positions = golden_positions(ids)
    greedy = continue_greedily(model, ids, GREEDY_TOKENS)
    return GoldenCase(
        ids=np.array(ids, np.int64),
        positions=positions,
        logits=logits_of(model, ids)[positions],
        greedy=np.array(greedy, np.int64),
    )
