"""The agent: one process on each node, which starts the ranks of a run, watches them, and restarts them."""
