"""attnpatch doctor: what is installed, what can be used, and why not."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from typing import Annotated, Any

import typer

from attnpatch.cli._common import JsonOption, human_bytes, print_json
from attnpatch.errors import ConfigError

OLDEST_TORCH = (2, 11)
PACKAGES = ("accelerate", "safetensors", "flash-attn-4", "flash-attn", "triton", "peft", "torchao")


CalibrateOption = Annotated[
    bool, typer.Option("--calibrate", help="First measure from which length sparse attention pays on this machine.")
]


def doctor(as_json: JsonOption = False, calibrate: CalibrateOption = False) -> None:
    """Show versions, the GPU, the usable attention backends and what was measured of sparse attention.

    Exit code 1 if attnpatch cannot run here.
    """
    if calibrate:
        _calibrate(quiet=as_json)
    data = collect()
    if as_json:
        print_json(data)
    else:
        _print(data)
    if data["problems"]:
        raise typer.Exit(1)


def collect() -> dict[str, Any]:
    """Everything doctor reports, as plain data."""
    from attnpatch import __version__

    problems: list[str] = []
    data: dict[str, Any] = {
        "attnpatch": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": [],
        "backends": [],
        "breakeven": {},
        "problems": problems,
    }
    _check_transformers(problems)
    if data["torch"] is None:
        problems.append("torch is not installed; run: python -m pip install torch.")
        return data
    if _numbers(data["torch"]) < OLDEST_TORCH:
        problems.append(f"torch {data['torch']} is older than 2.11; run: python -m pip install 'torch>=2.11'.")
    import torch

    data["threads"] = torch.get_num_threads()
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        data["gpus"].append({"name": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}"})
    if data["transformers"] is not None:
        from attnpatch.executors import dense, pages

        for executor, module in (("dense", dense), ("pages", pages)):
            data["backends"] += [
                {"executor": executor, "name": n, "usable": bool(u), "reason": r} for n, u, r in module.backends()
            ]
        data["breakeven"] = _breakeven(problems)
    return data


def _measured_with() -> tuple[Any, Any]:
    """Device and dtype that sparse attention is measured with here."""
    import torch

    from attnpatch.executors.backends import here

    device = here()
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


def _breakeven(problems: list[str]) -> dict[str, Any]:
    """File, machine and limits of sparse prefills and decode steps, as measured."""
    from attnpatch import breakeven

    where = breakeven.machine(*_measured_with())
    try:
        found = breakeven.load().get(where, {})
    except ConfigError as error:
        problems.append(str(error))
        found = {}
    return {"file": str(breakeven.path()), "machine": where, "methods": {n: x._asdict() for n, x in found.items()}}


def _calibrate(quiet: bool) -> None:
    from attnpatch import breakeven
    from attnpatch.bench.breakeven import measure, measure_steps

    breakeven.folder()  # before minutes of measuring
    device, dtype = _measured_with()
    repeats = 5 if device.type == "cuda" else 2

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line)

    found = measure(device, dtype, repeats=repeats, say=say) | measure_steps(device, dtype, repeats=repeats, say=say)
    file = breakeven.save(breakeven.machine(device, dtype), found)
    if not quiet:
        typer.echo(f"written to {file}\n")


def _check_transformers(problems: list[str]) -> None:
    from attnpatch.engine.compat import check_versions
    from attnpatch.errors import VersionError

    try:
        check_versions()
    except VersionError as error:
        problems.append(str(error))
    except metadata.PackageNotFoundError:
        problems.append("transformers is not installed; run: python -m pip install 'transformers>=5.14,<6'.")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _print(data: dict[str, Any]) -> None:
    for key in ("attnpatch", "python", "platform", "torch", "transformers"):
        typer.echo(f"{key:<13} {data[key] or 'not installed'}")
    for name, version in data["packages"].items():
        typer.echo(f"{name:<13} {version or 'not installed (optional)'}")
    for gpu in data["gpus"]:
        typer.echo(f"GPU           {gpu['name']}, {human_bytes(gpu['memory'])}, capability {gpu['capability']}")
    if not data["gpus"]:
        typer.echo("GPU           none that torch can use")
    typer.echo("\nattention backends:")
    for b in data["backends"]:
        typer.echo(f"  {b['executor']:<6} {b['name']:<10} {'usable' if b['usable'] else 'not usable: ' + b['reason']}")
    measured = data["breakeven"].get("methods", {})
    typer.echo("\nsparse attention pays here:" if measured else "\nsparse attention: not measured here (--calibrate)")
    for name, row in measured.items():
        share = f"up to {row['share']:.0%} of the pages" if row["share"] < 1 or row["besides"] else ""
        share += f" less {row['besides']:.0f} / tokens" if row["besides"] else ""
        if row["paid"]:
            typer.echo(f"  {name:<17} from {row['tokens']} tokens{share and ', '}{share}; else it runs dense")
        else:
            below = f"at no measured length; runs dense below {row['tokens']} tokens"
            typer.echo(f"  {name:<17} {below}{share and ', from there '}{share}")
    for problem in data["problems"]:
        typer.echo(f"problem: {problem}")
    if not data["problems"]:
        typer.echo("\nno problems found")
