"""Entry of the `attnpatch` command: the commands, and errors as one line with exit code 2."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from attnpatch import __version__
from attnpatch.cli import (
    ask,
    bench,
    calibrate,
    compare,
    demo,
    doctor,
    evaluate,
    explain,
    generate,
    harness,
    listing,
    plan,
    profile,
    recipe,
    report,
    verify,
)
from attnpatch.errors import AttnPatchError

app = typer.Typer(
    name="attnpatch",
    help="Training-free long-context methods for HuggingFace LLMs.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Training-free long-context methods for HuggingFace LLMs."""


app.command("demo")(demo.demo)
app.command("list")(listing.list_command)
app.command("explain")(explain.explain)
app.command("generate")(generate.generate)
app.command("ask")(ask.ask)
app.command("calibrate")(calibrate.calibrate)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("plan")(plan.plan)
app.command("evaluate")(evaluate.evaluate)
app.command("lm-eval", context_settings=harness.CONTEXT, add_help_option=True)(harness.lm_eval)
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)
app.command("profile")(profile.profile)
app.command("report")(report.report)
app.add_typer(recipe.app, name="recipe")


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    before, mark, after = _split(argv)
    debug = "--debug" in before
    arguments = [a for a in before if a != "--debug"] + mark + after
    try:
        code: Any = app(args=arguments, prog_name="attnpatch", standalone_mode=False)
    except BrokenPipeError:  # the reader (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted.", 130)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
            return 2
        if debug:
            raise
        return _fail(_message(error), 2)
    if code == 130:  # what typer makes of Ctrl-C
        return _fail("interrupted.", 130)
    return code if isinstance(code, int) else 0


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def _split(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What stands before a bare `--`, the `--` itself, and what follows."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at : at + 1], argv[at + 1 :]


def _message(error: Exception) -> str:
    if isinstance(error, AttnPatchError):
        return str(error)
    usage = getattr(error, "format_message", None)  # typer's own usage errors
    if usage is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "attnpatch")
        return f"{usage()} ({command} --help shows what is allowed)"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {error} (add --debug for the traceback)"


def _fail(message: str, code: int) -> int:
    print(f"attnpatch: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
