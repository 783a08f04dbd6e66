"""attnpatch list: every registered method."""

from __future__ import annotations

from attnpatch.cli._common import JsonOption, folded, print_columns, print_json

STAGES = {
    "prefill": "the prompt is computed over fewer keys",
    "evict": "the cache keeps fewer entries",
    "decode": "the cache stays whole, a decode step reads little of it",
    "calibrate": "the attention of a few tokens is changed, by values found for a model and a task",
    "retrieve": "a long text is read in chunks, the answer generated from what was found",
}


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
    typer.echo()
    print_columns([(stage, meaning) for stage, meaning in STAGES.items()], fold=True)
    typer.echo("\n" + folded(f"recipes: {', '.join(recipes)}", indent="  "))
    typer.echo(
        folded("attnpatch explain NAME shows what a method does, attnpatch recipe show NAME where values come from.")
    )
