"""Pretrained models: loading, tokenizers, layer structure and shapes."""
