"""A user's own problems as a task of lm-evaluation-harness."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from datasets import DatasetDict
from lm_eval.api.task import ConfigurableTask

from ..config.user_code import load_grader
from ..grading import is_math_equivalent
from .problem_file import ProblemFile, load_problems


class ProblemTask(ConfigurableTask):
    """A task whose prompts are messages, and whose items come from a file.

    Args:
        name: name of the task.
        file: the file of problems.
        num_samples: completions per problem; with one, generation is greedy unless `is_sampled`.
        is_sampled: sample at temperature 1 instead of decoding greedily.
        max_new_tokens: maximum length of a completion, tokens.
        neutral_kwargs: generation settings that override those of a checkpoint.

    Raises:
        ConfigError: the grader can't be imported.
        DataError: the file can't be read, or a row is invalid.
    """

    def __init__(
        self,
        name: str,
        file: ProblemFile,
        num_samples: int,
        is_sampled: bool,
        max_new_tokens: int,
        **neutral_kwargs: Any,
    ) -> None:
        grade = load_grader(file.grader, is_math_equivalent)
        self._problems = load_problems(file)
        sampling = {"do_sample": True, "temperature": 1.0} if is_sampled else {"do_sample": False}
        super().__init__(
            config={
                "task": name,
                "dataset_path": "json",  # `download` doesn't use it
                "test_split": "test",
                "output_type": "generate_until",
                "doc_to_text": lambda doc: doc["messages"][-1]["content"],
                "doc_to_target": "",
                "num_fewshot": 0,
                "repeats": num_samples,
                "generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, **neutral_kwargs, **sampling},
                "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": num_samples}]}],
                "process_results": lambda doc, results: {
                    "score": [float(grade(text, doc["answer"])) for text in results[0]]
                },
                "metric_list": [{"metric": "score", "aggregation": len, "higher_is_better": True}],
            }
        )

    @property
    def conversation(self) -> int | None:
        """The first row that only a chat template can render, or None: its prompt isn't a single user message."""
        rows = enumerate(self._problems["messages"])
        return next((i for i, messages in rows if [m["role"] for m in messages] != ["user"]), None)

    @property
    def data_hash(self) -> str:
        """A digest of the problems."""
        digest = hashlib.sha256()
        for problem in self._problems:
            digest.update(json.dumps(problem, sort_keys=True).encode())
        return digest.hexdigest()[:12]

    def download(self, *_: Any, **__: Any) -> None:
        """Called by the harness's constructor."""
        self.dataset = DatasetDict({"test": self._problems})

    def fewshot_context(
        self,
        doc: dict[str, Any],
        *_: Any,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        **__: Any,
    ) -> str:
        """The prompt of a problem, rendered with the chat template, or as plain text."""
        if apply_chat_template and chat_template:
            return chat_template(doc["messages"], add_generation_prompt=True)
        return str(doc["messages"][-1]["content"])
