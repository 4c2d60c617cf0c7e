"""How weights are rounded: the options that `export` and `compress` share."""

from typing import Annotated

import typer

BlockSize = Annotated[
    int | None,
    typer.Option(help="Inputs that share a scale, of int8 and int4; default: 32.", show_default=False),
]
TableBits = Annotated[
    int | None,
    typer.Option(
        help="Of the embedding and the head in int4: 8, or 4, which is smaller and faster and loses more; default: 8.",
        show_default=False,
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Whether the middle of the range is zero in every block; default: int8 yes, int4 no.",
        show_default=False,
    ),
]
AccuracyLevel = Annotated[
    int | None,
    typer.Option(
        help="Of products with int8 and int4: 0 in float32, 4 with inputs rounded to 8 bits; default: 4.",
        show_default=False,
    ),
]
