"""Kernels for training and scoring. Each has a plain implementation as a fallback."""
