"""The typed schema of a training run: every field, its unit and its range. Values live in ``configs/``.

Owns the dataclasses that Hydra composes over and the checks that need no other information than the config itself.
Torch-free, so that the login node can use it. Must not know of nodes, Slurm or the launcher.
"""

from gpt.config.checks import nearest_divisor
from gpt.config.components import (
    Activation,
    AttentionBackend,
    ExpertBalance,
    ExpertMatmul,
    Ffn,
    Norm,
    NormPosition,
    Position,
    RopeScaling,
)
from gpt.config.data import (
    BYTE_VOCAB,
    DataConfig,
    Source,
    SyntheticConfig,
    TokenDtype,
    TokenFileFormat,
    TokenizerKind,
    WeightedPath,
)
from gpt.config.divergence import DivergenceConfig
from gpt.config.float8 import Float8
from gpt.config.model import ModelConfig
from gpt.config.optim import OptimConfig
from gpt.config.parallel import CpMethod, EngineKind, ParallelConfig, Schedule, Strategy
from gpt.config.train import (
    LOSS_CHUNK,
    CheckpointConfig,
    CompileMode,
    Device,
    EvalConfig,
    LoggingConfig,
    Precision,
    Recompute,
    TrainConfig,
)

__all__ = [
    "BYTE_VOCAB",
    "LOSS_CHUNK",
    "Activation",
    "AttentionBackend",
    "CheckpointConfig",
    "CompileMode",
    "CpMethod",
    "DataConfig",
    "Device",
    "DivergenceConfig",
    "EngineKind",
    "EvalConfig",
    "ExpertBalance",
    "ExpertMatmul",
    "Ffn",
    "Float8",
    "LoggingConfig",
    "ModelConfig",
    "Norm",
    "NormPosition",
    "OptimConfig",
    "ParallelConfig",
    "Position",
    "Precision",
    "Recompute",
    "RopeScaling",
    "Schedule",
    "Source",
    "Strategy",
    "SyntheticConfig",
    "TokenDtype",
    "TokenFileFormat",
    "TokenizerKind",
    "TrainConfig",
    "WeightedPath",
    "nearest_divisor",
]
