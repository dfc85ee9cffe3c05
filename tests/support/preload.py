"""Imports of the ranks of a test, in the server process that they are forked from: once, and never collected."""

from launch.process import lasting_imports

with lasting_imports():
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    import gpt.train  # noqa: F401
