"""Mixtures other than MoDE: low-rank banks, feed-forward and attention experts, ensembles, task routers."""
