"""What follows from the config and the number of ranks: dimensions, micro-batches, stages, rules. Torch-free."""
