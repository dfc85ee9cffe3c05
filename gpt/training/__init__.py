"""The parts of the training loop: the run, its steps, evaluation, checkpoints, and stopping."""
