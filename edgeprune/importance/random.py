"""Random: every unit gets a score from a seeded generator. The floor that a method must beat.

`random:SEED` sets the seed (default 0). A group's scores depend on the seed and its name alone.
"""

import zlib

import torch

from edgeprune.groups import Group
from edgeprune.importance import Evidence
from edgeprune_runtime.errors import EdgepruneError

NEEDS: frozenset[str] = frozenset()
ARGUMENT = "the seed"
LARGEST_SEED = 2**31 - 1


def scores(group: Group, evidence: Evidence, argument: str | None) -> torch.Tensor:
    """Uniform draws from [0, 1): float32 `(units,)`."""
    # a hash of both, as a generator of torch looks at 32 bits of its seed only
    seed = zlib.crc32(f"{int(argument or 0)} {group.name}".encode())
    return torch.rand(group.units, generator=torch.Generator().manual_seed(seed))


def check(argument: str | None) -> None:
    """Check what the user wrote after the colon.

    Raises:
        EdgepruneError: if it is no seed.
    """
    if argument is not None and not (argument.isascii() and argument.isdecimal() and int(argument) <= LARGEST_SEED):
        raise EdgepruneError(f"random:{argument} is no seed; expected a whole number from 0 to {LARGEST_SEED}")
