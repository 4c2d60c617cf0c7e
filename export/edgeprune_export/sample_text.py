"""Text to compare two models on, and windows of its tokens."""

from collections.abc import Sequence
from itertools import cycle, islice

from tokenizers import Tokenizer

from edgeprune_runtime.errors import EdgepruneError

DEFAULT_TEXT = """\
The mill stood where the river bends, below the old bridge, and for most of the year nobody thought about it. In spring
the water rose to the second step and the miller's children carried the flour sacks to the loft. Then the whole village
came to look at the wheel, because a wheel under water turns the wrong way for an hour before it stops.

A lens gathers light in proportion to its area, so doubling the diameter makes the image four times as bright. What it
gains in brightness it pays for in depth: objects in front of the plane of focus, and behind it, blur sooner. A patient
observer closes the aperture, waits longer, and lets time do the work that glass cannot.

"You said Tuesday," she answered, "and today is Thursday." He counted the days on his fingers, found that she was right,
and put the letter back into his coat. There were 3 of them by then: one from the bank, one from his brother in Lisbon,
and one that he had not opened since the 14th of March.

To make the dough, mix 500 grams of flour with 320 grams of water, 10 grams of salt and a little yeast. Leave it under a
cloth until it has doubled; in a cold kitchen that may take until the next morning. Fold it twice, shape it, and bake it
in a hot oven for forty minutes. The crust should sound hollow when it is tapped from below.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Maps of the coast disagree about the island. The oldest shows a harbour on its northern side, drawn with care, and a
tower; the next one moves the harbour to the south and leaves the tower out. Whoever sailed there last must have asked
the way, for the margin says in small letters that the current is strong, that the people are kind, and that the wells
are dry in August.
"""


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around them."""
    return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]


def windows(sequences: Sequence[Sequence[int]], *, count: int, tokens: int) -> list[list[int]]:
    """`count` windows of `tokens` ids, evenly spread over the joined sequences; a short text is read in a circle.

    Raises:
        EdgepruneError: if the sequences hold too few tokens to tell windows apart.
    """
    joined = [token for row in sequences for token in row]
    if len(joined) < 2 * count:
        raise EdgepruneError(
            f"the sample text has {len(joined)} tokens; expected at least {2 * count}, give a longer one"
        )
    shift = len(joined) // count
    return [list(islice(cycle(joined), index * shift, index * shift + tokens)) for index in range(count)]
