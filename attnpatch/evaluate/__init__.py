"""Quality of a patched model: tasks, formats, metrics, a runner, paired statistics, results."""
