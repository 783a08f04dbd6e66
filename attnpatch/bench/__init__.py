"""Measuring scripts: `python -m attnpatch.bench.engine` (time and memory), `python -m attnpatch.bench.quality`."""
