"""TRL is pinned to a minor series; these are its and transformers' internals that tsdkd overrides or calls.

If one of them moves, a run could train on something else without any error. This fails instead, and says what moved.
"""

import dataclasses
import inspect

import pytest
import transformers
import trl
from transformers import Trainer
from trl.experimental.gkd import GKDTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import add_hooks, remove_hooks
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import create_model_from_path, print_prompt_completions_sample

from tsdkd.trainer.trainer import TokenSelectiveTrainer

OVERRIDDEN = [
    "get_batch_samples",
    "training_step",
    "compute_loss",
    "evaluate",
    "evaluation_loop",
    "prediction_step",
    "log",
    "train",
    "_save_checkpoint",
    "_save",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_get_grad_norm",
    "save_model",
    "create_model_card",
]
CALLED = {
    "_run_epoch": [
        "self.get_batch_samples(epoch_iterator, num_batches, self.args.device)",
        "self.training_step(",
        "self._load_rng_state(resume_from_checkpoint)",
        "_get_grad_norm(model",
    ],
    "training_step": ["self.model_accepts_loss_kwargs", "num_items_in_batch=num_items_in_batch", "scale_wrt_gas"],
    # what `CheckpointMixin` writes instead
    "_save_checkpoint": [
        "self._save_optimizer_and_scheduler(output_dir)",
        "self._save_scaler(output_dir)",
        "self._save_rng_state(output_dir)",
        "ExportableState",
        "self._push_from_checkpoint(output_dir)",
    ],
    "_save": ["self.model.save_pretrained(", "self.processing_class.save_pretrained(", "torch.save(self.args"],
    "_prepare_for_training": ["self._load_optimizer_and_scheduler(resume_from_checkpoint)"],
    "_maybe_log_save_evaluate": ['logs["loss"]', "nested_gather(tr_loss"],
}


def test_the_series_we_are_pinned_to():
    assert trl.__version__.startswith("1.16."), "TRL's minor series changed: read its GKDTrainer and SFTTrainer again"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_we_override_still_exists(name):
    theirs = getattr(GKDTrainer, name, None)
    assert theirs is not None, f"TRL {trl.__version__} has no {name} any more: our override is never called"
    ours = inspect.signature(getattr(TokenSelectiveTrainer, name)).parameters
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    theirs_names = [
        n for n, p in inspect.signature(theirs).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    missing = [n for n in theirs_names if n not in ours]
    assert takes_anything or not missing, f"{name} now takes {missing}, which our override would refuse"


@pytest.mark.parametrize("name", CALLED)
def test_transformers_still_calls_us_there(name):
    source = inspect.getsource(getattr(Trainer, name))
    for text in CALLED[name]:
        assert text in source, f"transformers {transformers.__version__}: Trainer.{name} no longer has {text!r}"


def test_the_gkd_constructor_does_nothing_new():
    """We call its parent's constructor instead; what it does besides is repeated by hand."""
    source = inspect.getsource(GKDTrainer.__init__)
    attributes = {line.split("=")[0].strip() for line in source.splitlines() if line.strip().startswith("self.")}
    known = {"self.teacher_model", "self.lmbda", "self.beta", "self.temperature", "self.seq_kd"}
    known |= {"self.generation_config", "self.generation_kwargs", "self.generation_config.eos_token_id"}
    known |= {"self.model.generation_config.eos_token_id is not None", "self.model.generation_config.eos_token_id"}
    assert attributes <= known, f"GKDTrainer now also sets {attributes - known}"


def test_grpo_keeps_between_steps_what_we_save():
    source = inspect.getsource(trl.GRPOTrainer)
    for text in (
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        "self._step += 1",
    ):
        assert text in source, f"TRL {trl.__version__}: GRPOTrainer has no {text!r} any more"
    names = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert {"generation_batch_size", "max_completion_length", "epsilon", "num_generations"} <= names


def test_helpers_keep_their_arguments():
    for hooks in (add_hooks, remove_hooks):
        assert list(inspect.signature(hooks).parameters) == ["model"]
    assert "model_id" in inspect.signature(create_model_from_path).parameters
    assert {"model", "args", "data_collator", "peft_config", "processing_class"} <= set(
        inspect.signature(SFTTrainer.__init__).parameters
    )


def test_the_table_of_completions_takes_our_columns(capsys):
    """Without rewards and advantages, with brackets that rich would take for markup."""
    print_prompt_completions_sample(["[red]1 + 1"], ["= 2"], {}, None, 7, extra={"Tokens": [3], "Ended": ["limit"]})
    printed = capsys.readouterr().out
    for text in ("Step 7", "Prompt", "Completion", "Tokens", "Ended", "[red]1 + 1", "= 2", "3", "limit"):
        assert text in printed
    assert "Advantage" not in printed


ENGINE = {
    "__init__": ["self._init_vllm()", "DistributedBackend(accelerator)"],
    "_init_vllm": ["self.llm = LLM(", "self.tp_group, _ =", "self._llm_weights_sleeping = "],
    "sync_weights": ["self._iter_named_params()", "self.vllm_client.update_named_params("],
    "_iter_named_params": ["self._dist.gather_params("],
    "generate": ["self.llm.sleep(level=2)", 'self.llm.wake_up(tags=["kv_cache"])'],
}


@pytest.mark.parametrize("name", ENGINE)
def test_trls_engine_still_works_through_what_we_replace(name):
    source = inspect.getsource(getattr(VLLMGeneration, name))
    missing = [text for text in ENGINE[name] if text not in source]
    assert not missing, f"TRL {trl.__version__}: VLLMGeneration.{name} has no {missing} any more"


def test_trls_client_checks_the_server_before_it_asks_it():
    source = inspect.getsource(VLLMClient.__init__)
    order = [source.index(text) for text in ("self.session = ", "self.check_server(", "self._get(")]
    assert order == sorted(order), "our deadline is set in check_server: requests before it have none"
