"""How many units each layer keeps, at a given number of parameters to remove.

One file per method; to add one, imitate `uniform.py`: `allocate(problem, argument)` returns the keep list, and
`check(argument, heads)` refuses a wrong argument before any long work. `argument` is what the user wrote after the
colon in `--allocation name:argument`, or None. `edgeprune.budget` has the arithmetic they share: `cut_evenly` gives the
same widths to all layers it is told to cut, `cut_cheapest` walks down the whole model by a price, `settle` meets the
target with single steps.
"""
