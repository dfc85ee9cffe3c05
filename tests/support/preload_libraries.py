"""Imports of libraries, in the server process that commands are forked from: none of this project's own modules.

What is forked of a process that has imported these alone may import the project from anywhere: from another checkout,
or with something of a test's put before it.
"""

from importlib import import_module

from launch.process import lasting_imports

with lasting_imports():
    for name in (
        *("filelock", "fsspec", "numpy", "packaging.requirements", "pytest", "safetensors.torch", "tqdm", "yaml"),
        *("hydra", "hydra._internal.config_loader_impl", "hydra._internal.core_plugins.basic_sweeper"),
        *("hydra.core.override_parser.overrides_parser", "matplotlib.backends.backend_agg", "matplotlib.figure"),
        *("rich.console", "rich.progress", "rich.table", "submitit.core._submit", "submitit.local._local"),
        *("tensorboard.compat.proto", "tensorboard.plugins.custom_scalar", "tensorboard.plugins.hparams"),
        *("tensorboard.summary.writer.event_file_writer", "torch.distributed.checkpoint.state_dict"),
        *("torch.distributed.elastic.agent.server.local_elastic_agent", "torch.distributed.fsdp"),
        *("torch.distributed.pipelining", "torch.distributed.tensor.parallel", "torch.nn.attention.flex_attention"),
        *("torch.profiler", "torch.utils.flop_counter", "torch.utils.serialization"),
    ):
        import_module(name)
