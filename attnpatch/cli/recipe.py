"""attnpatch recipe: show, validate and begin recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnpatch.cli._common import JsonOption, print_json
from attnpatch.errors import ConfigError

app = typer.Typer(help="Show, validate or begin a recipe.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A packaged recipe or a .yaml file.")],
    as_json: JsonOption = False,
) -> None:
    """Print a recipe."""
    from attnpatch.recipe import load_recipe

    recipe = load_recipe(name)
    if as_json:
        print_json(recipe.as_dict())
    else:
        typer.echo(recipe.to_yaml(), nl=False)


@app.command()
def validate(files: Annotated[list[str], typer.Argument(help="Recipes: packaged names or .yaml files.")]) -> None:
    """Check recipes; the first wrong one is the error."""
    from attnpatch.recipe import load_recipe

    for name in files:
        load_recipe(name)
        typer.echo(f"{name}: ok")


@app.command()
def new(
    patch: Annotated[str, typer.Argument(help="A method, or a+b.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file to write; default: stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a recipe that holds a method's defaults, to be edited."""
    from attnpatch.recipe import Recipe

    if output is not None and (output.is_dir() or output.suffix.lower() not in (".yaml", ".yml")):
        raise ConfigError(f"--output {str(output)!r} is not the name of a .yaml file; give one such as mine.yaml.")
    empty = Recipe(patch)
    built = empty.build()
    values = {p.name: p.hyperparameters() for p in built}
    recipe = Recipe(patch, values if len(built) > 1 else values[built[0].name], name=output.stem if output else patch)
    if output is None:
        typer.echo(recipe.to_yaml(), nl=False)
        return
    if output.exists() and not force:
        raise ConfigError(f"{output} exists; add --force to overwrite it.")
    recipe.save(output)
    typer.echo(f"{output}: written")
