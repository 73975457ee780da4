"""Evaluation: benchmarks, long context, and what a model predicts token by token."""


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked: what is missing or wrong, and what to do."""
