"""The methods of the papers, one file each, and the registry of all methods (`registry.py`).

To add one to tsdkd, write a file beside these and add its trainer here (docs/methods.md).
"""

from .distillm import DistiLLMConfig, DistiLLMTrainer
from .eopd import EOPDConfig, EOPDTrainer
from .eopd_full import EOPDFullConfig, EOPDFullTrainer
from .eopd_random import EOPDRandomConfig, EOPDRandomTrainer
from .gkd import GKDConfig, GKDTrainer
from .grpo import GRPOConfig, GRPOTrainer
from .kd import KDConfig, KDTrainer
from .minillm import MiniLLMConfig, MiniLLMTrainer
from .opd import OPDConfig, OPDTrainer
from .opd_advantage_shaping import OPDAdvantageShapingConfig, OPDAdvantageShapingTrainer
from .opd_entropy_bonus import OPDEntropyBonusConfig, OPDEntropyBonusTrainer
from .registry import METHODS, all_methods, find_method, register_method
from .seq_kd import SeqKDConfig, SeqKDTrainer
from .speculative_kd import SpeculativeKDConfig, SpeculativeKDTrainer
from .supervised_kd import SupervisedKDConfig, SupervisedKDTrainer
from .tsd_kd import TSDKDConfig, TSDKDTrainer
from .tsd_kd_released import TSDKDReleasedConfig, TSDKDReleasedTrainer

METHODS.update(
    (trainer.config_class.method, trainer)
    for trainer in (
        TSDKDTrainer,
        EOPDTrainer,
        GKDTrainer,
        MiniLLMTrainer,
        DistiLLMTrainer,
        SpeculativeKDTrainer,
        SupervisedKDTrainer,
        SeqKDTrainer,
        KDTrainer,
        GRPOTrainer,
        OPDTrainer,
        OPDEntropyBonusTrainer,
        OPDAdvantageShapingTrainer,
        EOPDFullTrainer,
        EOPDRandomTrainer,
        TSDKDReleasedTrainer,
    )
)
