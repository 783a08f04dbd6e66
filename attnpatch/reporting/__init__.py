"""One HTML page from result files and eviction traces; only `tracing` imports torch."""
