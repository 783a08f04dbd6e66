"""attnpatch lm-eval: lm-evaluation-harness on a patched model."""

from __future__ import annotations

import typer

from attnpatch.cli import _common as c

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def lm_eval(
    ctx: typer.Context,
    model: c.ModelOption,
    patch: c.PatchOption = None,
    recipe: c.RecipeOption = None,
    settings: c.SetOption = None,
) -> None:
    """Run lm-evaluation-harness under a method; further arguments are its own (--tasks, --limit, --batch_size ...)."""
    from attnpatch.evaluate import harness

    chosen = c.chosen_recipe(patch, recipe, settings)
    patches = [] if chosen is None else chosen.build()
    harness.base_class()  # says what to install before anything is loaded
    from attnpatch.engine.compat import check_versions

    check_versions()
    source = c.model_source(model)
    harness.run(source, patches, ctx.args)
