"""`SpeculativeKDTrainer`: the teacher replaces the student's unlikely tokens while it samples."""

from ..methods import SpeculativeKDConfig
from ..rollout import Sampler, Sampling
from ..rollout.together import TogetherSampler, interleaved
from ..trainer import TokenSelectiveTrainer


class SpeculativeKDTrainer(TokenSelectiveTrainer):
    """Speculative KD (arXiv 2410.11325). Arguments: see `TokenSelectiveTrainer`."""

    config_class = SpeculativeKDConfig

    def _make_sampler(self) -> Sampler:
        sampling = Sampling(frozenset(self.stop_ids), self.pair.shared_vocab_size)
        return TogetherSampler(self.accelerator, self.args, sampling, self.teacher_model, interleaved(self.args))
