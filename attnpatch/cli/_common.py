"""What several commands share: options, prompts, recipes, model loading, one timed generation."""

from __future__ import annotations

import io
import json
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnpatch.cli.screen import screen
from attnpatch.errors import ConfigError, InputError

if TYPE_CHECKING:
    from attnpatch.patch import Patch
    from attnpatch.recipe import Recipe

DENSE = "dense"
TESTBED = "testbed"  # --model testbed is the embedded model, whatever folders there are
DTYPES = ("auto", "float32", "bfloat16", "float16")
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's ways to spread a model
CHATTY = ("torchao", "torch.utils._pytree")  # loggers that report on their own loading when transformers imports them

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="A local folder, a hub id (downloaded if absent), or testbed: the embedded model, also where a folder is "
        "called so (./testbed is the folder).",
    ),
]
PatchOption = Annotated[str | None, typer.Option("--patch", help="A method, or a+b; attnpatch list shows all.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A packaged recipe or a .yaml file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter; repeatable.")
]
PromptOption = Annotated[str | None, typer.Option("--prompt", help="The prompt.")]
PromptFileOption = Annotated[str | None, typer.Option("--prompt-file", help="A file with the prompt; - is stdin.")]
ContextOption = Annotated[str | None, typer.Option("--context-file", help="A long text; needs --question.")]
QuestionOption = Annotated[str | None, typer.Option("--question", help="Asked after the text of --context-file.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 = greedy; above 0 samples.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the sampling.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="auto, float32, bfloat16, float16. Default: float32 on a CPU, else auto.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device-map", help="cpu, cuda, auto ... Default: cuda if there is one, else cpu.")
]
RawOption = Annotated[bool, typer.Option("--raw", help="Feed the prompt as it is, without the chat template.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_columns(rows: list[tuple[str, ...]], fold: bool = False) -> None:
    """Left-aligned columns; the first row is the heading. fold: the last column is broken to fit the screen."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    start = sum(widths[:-1]) + 2 * (len(widths) - 1)
    room = max(24, screen() - start)
    for row in rows:
        line = "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        if fold and len(row[-1]) > room:
            lines = textwrap.wrap(row[-1], room, break_on_hyphens=False)
            line = line[:start] + f"\n{' ' * start}".join(lines)
        typer.echo(line)


def human_bytes(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def percent(part: float, whole: float) -> str:
    """'4.1 %', or '-' without a whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


# ---- what to apply -----------------------------------------------------------------------------------------------
def chosen_recipe(patch: str | None, recipe: str | None, settings: list[str] | None) -> Recipe | None:
    """The recipe from --patch or --recipe with --set on top; None for --patch dense."""
    from attnpatch.recipe import Recipe, load_recipe, merge_settings

    if (patch is None) == (recipe is None):
        raise ConfigError("give exactly one of --patch NAME and --recipe FILE (--patch dense runs without a patch).")
    if patch == DENSE:
        if settings:
            raise ConfigError("--patch dense has no hyperparameters; leave --set out.")
        return None
    base = Recipe(patch) if patch is not None else load_recipe(str(recipe))
    return merge_settings(base, settings or [])


def required_recipe(patch: str | None, recipe: str | None, settings: list[str] | None) -> Recipe:
    """As chosen_recipe, for commands that need a method."""
    chosen = chosen_recipe(patch, recipe, settings)
    if chosen is None:
        raise ConfigError("this command needs a method; name one with --patch (attnpatch list shows all).")
    return chosen


# ---- prompts -----------------------------------------------------------------------------------------------------
def read_prompt(prompt: str | None, prompt_file: str | None, context_file: str | None, question: str | None) -> str:
    """The prompt's text from one of the three ways to give it. Raises on an empty one."""
    if sum(x is not None for x in (prompt, prompt_file, context_file)) != 1:
        raise ConfigError("give exactly one of --prompt, --prompt-file (- for stdin) and --context-file.")
    if (context_file is None) != (question is None):
        raise ConfigError("--context-file and --question belong together; give both.")
    if context_file is not None:
        context = _read_file(context_file).strip()
        if not context or not (question or "").strip():
            raise InputError("the context file or the question is empty; give text in both.")
        return f"{context}\n\n{question}"
    text = prompt if prompt_file is None else _read_file(prompt_file)
    if not text or not text.strip():
        raise InputError("the prompt is empty; give some text.")
    if any("\ud800" <= x <= "\udfff" for x in text):  # how Python hands on bytes of a command line that are no text
        raise InputError("the prompt is not UTF-8 text; give it as UTF-8.")
    return text


def _read_file(path: str, stdin: bool = True) -> str:
    """The text of a file, or with `stdin` what "-" stands for. Raises InputError where it is not UTF-8."""
    piped = stdin and path == "-"
    try:
        if not piped:
            return Path(path).read_text(encoding="utf-8-sig")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # whatever the locale says
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise InputError(f"{'stdin' if piped else path} is not UTF-8 text; save it as UTF-8.") from None


def read_text(path: str) -> str:
    """The text of a file. Raises InputError where it is not UTF-8 or empty."""
    words = _read_file(path, stdin=False)
    if not words.strip():
        raise InputError(f"{path} is empty; give a file with text.")
    return words


def encode(tokenizer: Any, text: str, raw: bool) -> Any:
    """Token ids [1, N] of the prompt, through the chat template unless raw."""
    if raw:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    elif not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the model's tokenizer has no chat template; add --raw to feed the prompt as it is.")
    else:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    if not ids.shape[1]:
        raise InputError("the prompt has no tokens; give some text.")
    return ids


# ---- models ------------------------------------------------------------------------------------------------------
def load_model(name: str, dtype: str | None, device_map: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) of a local folder, a hub id or the embedded testbed."""
    from attnpatch.engine.compat import check_versions

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is not allowed; choose one of {', '.join(DTYPES)}.")
    check_versions()
    import torch

    quiet()
    source = name if name == TESTBED else _model_source(name)
    device_map, on_cpu = _device(device_map)
    dtype = dtype or ("float32" if on_cpu else "auto")
    if name == TESTBED:
        model, tokenizer = load_testbed()
        wanted = model.dtype if dtype == "auto" else getattr(torch, dtype)
        device = device_map if device_map not in SPREADS else "cpu" if on_cpu else "cuda"
        return model.to(device=device, dtype=wanted), tokenizer
    return _from_pretrained(source, dtype, device_map)


def model_source(name: str) -> str:
    """The folder or hub id that --model means, the embedded model's own folder for testbed. Raises ConfigError."""
    if name != TESTBED:
        return _model_source(name)
    from attnpatch import testbed

    return str(testbed.path())


def _model_source(name: str) -> str:
    """The folder or hub id that --model means. Raises ConfigError where it can only be a mistake."""
    if not name.strip():
        raise ConfigError("--model is empty; give a local folder, a hub id such as org/model, or testbed.")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"the folder {name!r} has no config.json; give one that save_pretrained wrote.")
        return str(path)
    if path.exists():
        raise ConfigError(f"{name!r} is a file; --model takes the folder with its config.json, a hub id, or testbed.")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise ConfigError(f"there is no model folder {name!r}; check the path, or give a hub id such as org/model.")
    return name


def _device(wanted: str | None) -> tuple[str, bool]:
    """(device map, whether the model runs on the CPU). Raises ConfigError on a device that is not here."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is None:
        return ("cuda", False) if gpus else ("cpu", True)
    if wanted in SPREADS:
        return wanted, not gpus
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = torch.device("meta")
    present = torch.accelerator.current_accelerator()
    if device.type not in ("cpu", "cuda", present.type if present is not None else "cpu"):
        allowed = f"cpu, cuda, cuda:0 ..., {', '.join(SPREADS)}"
        raise ConfigError(f"--device-map {wanted!r} is not a device; choose one of {allowed}.")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(
            f"--device-map {wanted}: torch can use {gpus or 'no'} GPU{'s' if gpus > 1 else ''} here "
            "(attnpatch doctor shows what it sees); leave --device-map out, or give cpu."
        )
    return wanted, device.type == "cpu"


def _from_pretrained(source: str, dtype: str, device_map: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=device_map, trust_remote_code=False
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError ...
        if "--debug" in sys.argv:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = " ".join(lines[:4]) if lines[0].endswith(":") else lines[0]
        if not Path(source).is_dir():
            first += f" (no folder {source!r} is here, so it was taken as a hub id)"
        raise ConfigError(f"the model {source!r} cannot be loaded: {first}") from error
    return model.eval(), tokenizer


def load_testbed() -> tuple[Any, Any]:
    """The embedded model, or an error that says what is missing."""
    quiet()
    from attnpatch import testbed

    try:
        model, tokenizer = testbed.load()
    except OSError as error:
        raise ConfigError(
            "the embedded model's weights are missing or unreadable; reinstall attnpatch from a complete checkout."
        ) from error
    return model.eval(), tokenizer


def quiet() -> None:
    """Keep notices, retries and loading bars of transformers and the hub off the terminal; errors still come."""
    from logging import ERROR, getLogger

    for name in CHATTY:
        getLogger(name).setLevel(ERROR)
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    hub.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


# ---- one generation ----------------------------------------------------------------------------------------------
@dataclass
class Result:
    """One generation, timed."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    bytes_held: int
    bytes_dense: int
    patch: str = DENSE
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    new_ids: list[int] = field(default_factory=list, repr=False)
    note: str = ""  # what status has to say, e.g. that nothing was evicted

    def as_dict(self) -> dict[str, Any]:
        data = {k: v for k, v in self.__dict__.items() if k != "new_ids"}
        return {**data, "seconds": round(self.seconds, 3)}

    def summary(self) -> str:
        held = f"KV held {human_bytes(self.bytes_held)} of {human_bytes(self.bytes_dense)} dense"
        share = percent(self.bytes_held, self.bytes_dense)
        line = f"{self.patch}: {self.prompt_tokens} + {self.new_tokens} tokens, {self.seconds:.1f} s, {held} ({share})"
        return f"{line}\n{self.note}" if self.note else line


def generate_once(
    model: Any,
    tokenizer: Any,
    ids: Any,
    patches: list[Patch] | None,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Any = None,
) -> Result:
    """Generate from ids [1, N], under the patches if there are any; the model is as before afterwards."""
    import time
    from contextlib import nullcontext

    import torch

    from attnpatch.api import patched
    from attnpatch.engine.compat import greedy_options, input_device, output_cache, pad_id

    ids = ids.to(input_device(model))
    for patch in patches or ():
        if getattr(patch, "tokenizer", tokenizer) is None:  # a method that reads text
            patch.tokenizer = tokenizer  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else greedy_options(model)
    pad = pad_id(tokenizer)
    with patched(model, patches) if patches else nullcontext(), torch.inference_mode():
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer,
            pad_token_id=pad, return_dict_in_generate=True, **sampling,
        )  # fmt: skip
        new_ids = out.sequences[0, ids.shape[1] :].tolist()  # waits for the device
        seconds, note = time.perf_counter() - start, ""
        if patches:
            from attnpatch.report import status

            report = status(model)
            held, dense, note = report.bytes_held, report.bytes_dense, report.note
        else:
            held = dense = cache_bytes(output_cache(out))
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    names = "+".join(p.name for p in patches) if patches else DENSE
    return Result(text, ids.shape[1], len(new_ids), seconds, held, dense, names, settings_of(patches), new_ids, note)


def settings_of(patches: list[Patch] | None) -> dict[str, Any]:
    """Hyperparameters as they run: flat for one method, per method for several."""
    if not patches:
        return {}
    return patches[0].hyperparameters() if len(patches) == 1 else {p.name: p.hyperparameters() for p in patches}


def cache_bytes(cache: Any) -> int:
    """Bytes allocated for K and V in a transformers cache, as `status` counts them."""
    from attnpatch.engine.slots import allocated

    return allocated(*(t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None))
