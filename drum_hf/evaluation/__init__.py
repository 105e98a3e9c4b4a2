"""Metrics, their uncertainty, the strategies that are compared, and the reports that come out.

- `metrics`: every metric: the registry, `evaluate.Metric` subclasses, and the functions of `answers`, `cider`, `roc`
  and `rankings`.
- `evaluator`: what an LVLM answers with the demonstrations that a strategy chose, and how good that is.
- `retrieval`: how well a strategy ranks demonstrations, judged by the LVLM's own scores.
- `statistics`: bootstrap intervals and paired comparisons.
"""
