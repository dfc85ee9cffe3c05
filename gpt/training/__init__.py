"""What the training loop is made of: the run, its steps, evaluation, checkpoints, and stopping."""
