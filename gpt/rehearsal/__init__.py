"""Rehearsal of a training step at the true number of ranks, on tensors that have shapes but no values."""
