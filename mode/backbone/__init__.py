"""Pretrained models: loaded, measured, and described by their shape."""
