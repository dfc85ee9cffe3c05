"""The training library: a GPT, its data, its parallel engines, its checkpoints and its records.

The library imports neither Slurm's tools nor submitit. Importing ``gpt`` or ``gpt.config`` loads no torch.
"""
