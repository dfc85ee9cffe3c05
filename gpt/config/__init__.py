"""Typed schema of a training run: every field, its unit and its range. Values are in ``configs/``.

The schema imports no torch, so that the login node can use it.
"""

from gpt.config.data import (
    BYTE_VOCAB,
    DataConfig,
    Pack,
    Source,
    SyntheticConfig,
    TokenDtype,
    TokenFileFormat,
    TokenizerKind,
    WeightedPath,
)
from gpt.config.model import (
    Activation,
    AttentionBackend,
    ExpertBalance,
    ExpertMatmul,
    Ffn,
    ModelConfig,
    Norm,
    NormPosition,
    Position,
    RopeScaling,
)
from gpt.config.optim import DivergenceConfig, OptimConfig
from gpt.config.parallel import CpMethod, ParallelConfig, ReduceDtype, Schedule, Strategy
from gpt.config.rules import nearest_divisor
from gpt.config.train import (
    LOGITS_AT_ONCE,
    LOSS_CHUNK,
    CheckpointConfig,
    CompileMode,
    Device,
    Float8,
    Precision,
    Recompute,
    TrainConfig,
)

__all__ = [
    "BYTE_VOCAB",
    "LOGITS_AT_ONCE",
    "LOSS_CHUNK",
    "Activation",
    "AttentionBackend",
    "CheckpointConfig",
    "CompileMode",
    "CpMethod",
    "DataConfig",
    "Device",
    "DivergenceConfig",
    "ExpertBalance",
    "ExpertMatmul",
    "Ffn",
    "Float8",
    "ModelConfig",
    "Norm",
    "NormPosition",
    "OptimConfig",
    "Pack",
    "ParallelConfig",
    "Position",
    "Precision",
    "Recompute",
    "ReduceDtype",
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
