"""tsdkd: distil the reasoning of a large language model into a small one, on-policy and token-selectively."""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.base import TokenSelectiveConfig
    from .config.options import option
    from .errors import (
        ConfigError,
        DataError,
        EngineError,
        ModelError,
        OutputDirError,
        TokenizerMismatchError,
        TSDKDError,
    )
    from .lm_head.statistics import StatisticsRequest
    from .methods import EOPDConfig, EOPDTrainer, TSDKDConfig, TSDKDTrainer, register_method
    from .objective import Objective
    from .trainer.trainer import TokenSelectiveTrainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # GKDTrainer is experimental; its TRL series is pinned

__version__ = version("tsdkd")
__all__ = [
    "ConfigError",
    "DataError",
    "EOPDConfig",
    "EOPDTrainer",
    "EngineError",
    "ModelError",
    "Objective",
    "OutputDirError",
    "StatisticsRequest",
    "TSDKDConfig",
    "TSDKDError",
    "TSDKDTrainer",
    "TokenSelectiveConfig",
    "TokenSelectiveTrainer",
    "TokenizerMismatchError",
    "option",
    "register_method",
]

_HOMES = {
    **dict.fromkeys(("EOPDConfig", "EOPDTrainer", "TSDKDConfig", "TSDKDTrainer", "register_method"), "methods"),
    "Objective": "objective",
    "StatisticsRequest": "lm_head.statistics",
    "TokenSelectiveConfig": "config.base",
    "TokenSelectiveTrainer": "trainer.trainer",
    "option": "config.options",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `tsdkd --help` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'tsdkd' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
