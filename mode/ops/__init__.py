"""Kernels of training and scoring, each with a plain form to fall back on."""
