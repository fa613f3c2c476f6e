"""Attention operations: one folder an op, each with a reference, an XLA path and kernels."""
