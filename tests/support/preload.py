"""Imports of the ranks of a test, in the server process that they are forked from: once, and never collected.

All that ranks of tests import: a rank that lives for half a second would spend a good part of it on pytest alone.
"""

from importlib import import_module

from gpt.workload import PRELOAD
from launch.process import lasting_imports

with lasting_imports():
    import filelock  # noqa: F401
    import pytest  # noqa: F401
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.pipelining
    import torch.distributed.tensor
    import torch.profiler
    import torch.utils.serialization  # noqa: F401

    for name in (*PRELOAD, "tests.support.learning", "tests.support.tiny", "tests.support.watching"):
        import_module(name)
