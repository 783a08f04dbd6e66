"""Every contact with transformers lives here; methods and executors never import it."""
