"""Timing of interleaved variants, and what a run's JSON says about where it ran."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attnpatch.executors import dense


class Clock:
    """Time left for the whole script, and timing of one call on the device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.end = device, time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ms(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call: CUDA events around it, wall clock elsewhere."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def parser(about: str | None) -> argparse.ArgumentParser:
    """What the scripts that time kernels and models have in common on their command line."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--quick", action="store_true", help="a toy size: every line runs, no figure means anything")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--seconds", type=float, default=150, help="measuring stops adding repeats after this long")
    made.add_argument("--commit", help="commit to record where git cannot tell")
    return made


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Versions, commit (asked of git unless given) and device of a run."""
    commit = commit or _commit(Path(__file__))
    versions: dict[str, Any] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in ("attnpatch", "torch", "transformers", "triton", "flash-attn-4"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    if device.type == "cuda":
        versions["cudnn"] = torch.backends.cudnn.version()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    backends = [{"name": n, "usable": usable, "reason": why} for n, usable, why in dense.backends()]
    return {"versions": versions, "commit": commit, "device": f"one {name}", "dense_backends": backends}


def _commit(file: Path) -> str:
    """HEAD of the checkout that tracks `file`; "unknown" where it is installed (into somebody else's, say)."""
    try:
        for command in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"]):
            done = subprocess.run(["git", *command], cwd=file.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def interleave(
    runs: Mapping[str, Callable[[], Any]], repeats: int, clock: Clock, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Run all in turn, forwards and backwards, `repeats` times; stops early (at least 1) when time runs out."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warmup, repeats):
        if repeat > 0 and clock.left() < 0:
            break
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            spent = clock.ms(runs[name])
            if repeat >= 0:
                times[name].append(spent)
    return {name: summary(values) for name, values in times.items()}


def all_of(calls: list[Callable[[], Any]]) -> None:
    """Run each in turn."""
    for call in calls:
        call()


def captured(calls: list[Callable[[], Any]], clock: Clock) -> tuple[Callable[[], Any], str]:
    """(run of all calls, what is timed): a CUDA graph of them, or the calls themselves."""
    run = partial(all_of, calls)
    if clock.device.type != "cuda":
        return run, "wall clock"
    side = torch.cuda.Stream(clock.device)
    side.wait_stream(torch.cuda.current_stream(clock.device))
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream(clock.device).wait_stream(side)
    clock.wait()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        clock.wait()
        return run, f"events: {error}"[:200]
    return graph.replay, "graph"


def per_layer(
    calls: Mapping[str, list[Callable[[], Any]]], count: int, repeats: int, clock: Clock
) -> tuple[dict[str, dict[str, float]], dict[str, str], dict[str, str]]:
    """Times of one layer where each variant runs once on each of `count` layers; what was timed, and what failed."""
    runs: dict[str, Callable[[], Any]] = {}
    clocks, errors = {}, {}
    for name, each in calls.items():
        try:
            runs[name], clocks[name] = captured(each, clock)
        except Exception as error:  # a measuring script: one failure must not lose the rest
            errors[name] = f"{type(error).__name__}: {error}"[:500]
    times = interleave(runs, repeats, clock)
    for one in times.values():
        one |= {key: one[key] / count for key in ("median_ms", "p10_ms", "p90_ms")}
    return times, clocks, errors


def sweep(out: Path, body: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Measure row after row into body["rows"] and write the JSON after each."""
    started = time.monotonic()
    body["rows"] = []
    for row in rows:
        body["rows"].append(row)
        body["seconds"] = round(time.monotonic() - started, 2)
        out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        errors = row.get("errors") or ""
        print(row.get("tokens", row.get("keys")), json.dumps(row["over_dense"]), errors, flush=True)


def summary(values: list[float]) -> dict[str, float]:
    """Median and the spread between the first and the last decile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"median_ms": statistics.median(values), "p10_ms": cuts[0], "p90_ms": cuts[8], "n": len(values)}


def ratio(times: dict[str, dict[str, float]], a: str, b: str) -> float:
    """Median of `a` over median of `b`."""
    return round(times[a]["median_ms"] / times[b]["median_ms"], 5)
