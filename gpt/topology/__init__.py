"""Parallel dimensions, micro-batches, pipeline stages and their rules, from config and number of ranks. Imports no
torch."""
