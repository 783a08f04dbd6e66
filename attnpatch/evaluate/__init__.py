"""Evaluation of a patched model on long-context tasks: samples, metrics, readers of public sets."""
