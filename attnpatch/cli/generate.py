"""attnpatch generate: one prompt through a patched model, streamed."""

from __future__ import annotations

import typer

from attnpatch.cli import _common as c


def generate(
    model: c.ModelOption,
    patch: c.PatchOption = None,
    recipe: c.RecipeOption = None,
    settings: c.SetOption = None,
    prompt: c.PromptOption = None,
    prompt_file: c.PromptFileOption = None,
    context_file: c.ContextOption = None,
    question: c.QuestionOption = None,
    max_new_tokens: c.NewTokensOption = 256,
    temperature: c.TemperatureOption = 0.0,
    seed: c.SeedOption = 0,
    dtype: c.DtypeOption = None,
    device_map: c.DeviceOption = None,
    raw: c.RawOption = False,
    as_json: c.JsonOption = False,
) -> None:
    """Generate text from a prompt under a method; tokens go to stdout, a summary to stderr."""
    chosen = c.chosen_recipe(patch, recipe, settings)
    patches = chosen.build() if chosen else None
    text = c.read_prompt(prompt, prompt_file, context_file, question)
    loaded, tokenizer = c.load_model(model, dtype, device_map)
    ids = c.encode(tokenizer, text, raw)
    streamer = None
    if not as_json:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = c.generate_once(loaded, tokenizer, ids, patches, max_new_tokens, temperature, seed, streamer)
    if as_json:
        c.print_json(result.as_dict())
    else:
        typer.echo(result.summary(), err=True)
