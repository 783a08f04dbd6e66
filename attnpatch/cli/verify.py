"""attnpatch verify: check a method on the user's own model."""

from __future__ import annotations

import typer

from attnpatch.cli import _common as c


def verify(
    model: c.ModelOption,
    patch: c.PatchOption = None,
    recipe: c.RecipeOption = None,
    settings: c.SetOption = None,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    as_json: c.JsonOption = False,
) -> None:
    """Check a method on a model: large budget equals dense, un-patching is exact. Exit code 1 if a check fails."""
    patches = c.required_recipe(patch, recipe, settings).build()
    loaded, _ = c.load_model(model, dtype, device_map)
    from attnpatch.verifying import verify as check

    report = check(loaded, patches)
    if as_json:
        c.print_json(report.as_dict())
    else:
        typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)
