"""Metrics, their uncertainty, the strategies that are compared, and the reports that come out.

- `metrics`: answer and retrieval metrics, pure functions first, then `evaluate.Metric` subclasses.
- `cider`: CIDEr-D and its tokenizer.
- `statistics`: bootstrap intervals and paired comparisons.
"""
