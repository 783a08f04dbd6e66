"""attnpatch list: every registered method."""

from __future__ import annotations

from attnpatch.cli._common import JsonOption, print_columns, print_json


def list_command(as_json: JsonOption = False) -> None:
    """List the methods and the packaged recipes."""
    import typer

    from attnpatch.patch import list_patches
    from attnpatch.recipe import list_recipes

    patches, recipes = list_patches(), list_recipes()
    if as_json:
        rows = [
            {"name": n, "title": c.title, "stage": c.stage, "query_aware": c.query_aware, "paper": c.paper}
            for n, c in patches.items()
        ]
        return print_json({"patches": rows, "recipes": recipes})
    print_columns([("NAME", "STAGE", "TITLE"), *((n, c.stage, c.title) for n, c in patches.items())])
    typer.echo(f"\nrecipes: {', '.join(recipes)}\nattnpatch explain NAME shows a method's hyperparameters.")
