"""Outputs of a report: text, figures, page, TensorBoard."""
