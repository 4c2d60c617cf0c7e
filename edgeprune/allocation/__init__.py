"""How many units each layer keeps, at a given number of parameters to remove.

One file per method; to add one, imitate `uniform.py`: `allocate(problem, argument)` returns the keep list, and
`check(argument, heads)` refuses a wrong argument before any long work. `argument` is what the user wrote after the
colon in `--allocation name:argument`, or None. `edgeprune.budget` has the arithmetic they share.
"""
