"""Evaluates models. `problem_set` is the short evaluation of the demo and of comparisons; the rest is `tsdkd eval`.

`suites` lists the benchmarks, and `problem_file` reads a user's own problems. `tasks` and `problem_task` turn both
into tasks of lm-evaluation-harness, and `harness` runs a model on them. `items` stores responses and scores,
`evaluator` evaluates the missing items, and `scores` and `results` compute the statistics and the tables.
"""

from .problem_set import EvalResult, ProblemSet, evaluate

__all__ = ["EvalResult", "ProblemSet", "evaluate"]
