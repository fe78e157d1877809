"""Evaluates models: `problem_set` is the quick look of the demo and of comparisons; the rest is `tsdkd eval`.

`suites` names the benchmarks, `tasks` makes them for lm-evaluation-harness, `harness` runs a model on them, `items`
keeps its responses and scores, `evaluator` does what is missing, `scores` and `results` are statistics and tables.
"""

from .problem_set import EvalResult, ProblemSet, evaluate

__all__ = ["EvalResult", "ProblemSet", "evaluate"]
