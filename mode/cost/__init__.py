"""Closed forms of parameters and operations (FLOPs)."""
