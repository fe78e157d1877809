"""How good models are: `solving` is the quick look of training, demo and comparisons; the rest is `tsdkd eval`.

`suites` says which benchmarks, `tasks` makes them for lm-evaluation-harness, `harness` asks a model, `items` keeps
what came out, `runner` does what is missing, `scores` and `table` say what it means.
"""

from .problem_set import EvalResult, ProblemSet, evaluate

__all__ = ["EvalResult", "ProblemSet", "evaluate"]
