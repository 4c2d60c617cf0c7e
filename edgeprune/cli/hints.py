"""What to do next: commands that can be pasted as they stand."""

import shlex

import typer

PROMPT = ("--prompt", "Once upon a time")


def say_next(*commands: tuple[object, ...], where: str = "Next") -> None:
    """Show `edgeprune` commands, each as its words, on lines of their own on stderr."""
    lines = [shlex.join(("edgeprune", *map(str, words))) for words in commands]
    typer.echo(f"{where}: " + f"\n{' ' * len(where)}  ".join(lines), err=True)
