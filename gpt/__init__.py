"""The training library: a GPT, its data, its parallel engines, its checkpoints and its records.

Knows nothing of Slurm, submitit or the ``launch`` package. Importing ``gpt`` or ``gpt.config`` loads no torch.
"""
