"""Measures of the audit on tensors: pure functions over a model, patches and maps."""
