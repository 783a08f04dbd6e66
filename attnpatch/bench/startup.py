"""What starting costs: `python -m attnpatch.bench.startup --out FILE.json`.

Wall time of whole processes, run in turn: a bare interpreter, one that imports attnpatch, and `attnpatch list`. The
medians less the bare interpreter's are what attnpatch adds. Also notes which heavy packages each of them imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HEAVY = ("torch", "transformers", "numpy")
MARK = "heavy imports:"
IMPORT = "import attnpatch"
LIST = "import sys; from attnpatch.cli.main import run; sys.exit(run(['list']))"
CODE = {"bare interpreter": "pass", "import attnpatch": IMPORT, "attnpatch list": LIST}
TARGET_MS = {"import attnpatch": 60, "attnpatch list": 400}


def once(code: str) -> float:
    """Milliseconds of one process that runs `code`. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1e3


def heavy_imports(code: str) -> list[str]:
    """Those of HEAVY that a process has imported when `code` ends."""
    report = f"import atexit, sys; atexit.register(lambda: print({MARK!r}, *(n for n in {HEAVY} if n in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{report}\n{code}"], check=True, capture_output=True, text=True)
    return done.stdout.rpartition(MARK)[2].split()


def measure(runs: int) -> dict[str, Any]:
    """Times, what each adds to the bare interpreter, and its heavy imports. The first round only warms up."""
    from attnpatch.bench.measure import summary

    times: dict[str, list[float]] = {name: [] for name in CODE}
    for number in range(-1, runs):
        for name in list(CODE)[:: -1 if number % 2 else 1]:
            spent = once(CODE[name])
            if number >= 0:
                times[name].append(spent)
    found = {name: summary(values) for name, values in times.items()}
    bare = found["bare interpreter"]["median_ms"]
    return {
        name: {
            **{key: round(value, 2) for key, value in found[name].items()},
            "added_ms": round(found[name]["median_ms"] - bare, 2),
            "target_ms": TARGET_MS.get(name),
            "heavy_imports": heavy_imports(code),
        }
        for name, code in CODE.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=25, help="processes of each kind, at least 1")
    parser.add_argument("--commit", help="commit to record where git cannot tell")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    import torch

    from attnpatch.bench.measure import environment

    where = environment(torch.device("cpu"), args.commit)
    body = {
        "versions": where["versions"],
        "commit": where["commit"],
        "device": f"{os.cpu_count()}-core CPU",
        "what": "wall time of whole processes in ms; added_ms = median less the bare interpreter's",
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "P11": measure(args.runs),
    }
    args.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    for name, row in body["P11"].items():
        heavy = ", ".join(row["heavy_imports"]) or "nothing heavy"
        print(f"{name:17} {row['median_ms']:7.1f} ms, adds {row['added_ms']:6.1f} ms, imports {heavy}")


if __name__ == "__main__":
    main()
