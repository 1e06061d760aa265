"""Colours and markers of methods in figures."""

from __future__ import annotations

METHODS = {
    "backbone": ("black", "X"),
    "sft": ("orange", "o"),
    "wise-ft": ("orange", "<"),
    "l2-sp": ("orange", "v"),
    "ewc": ("orange", "^"),
    "flow": ("orange", ">"),
    "stm": ("orange", "d"),
    "rho-1": ("orange", "p"),
    "llama-pro": ("amber", "D"),
    "lora": ("amber", "s"),
    "task-arithmetic": ("sky", "<"),
    "ties": ("sky", ">"),
    "dare": ("sky", "d"),
    "btm": ("sky", "^"),
    "cbtm": ("sky", "v"),
    "btx": ("green", "P"),
    "dume": ("green", "v"),
    "flex-olmo": ("green", "*"),
    "flex-olmo-expert": ("green", "s"),
    "upcycling": ("green", "h"),
    "bam": ("green", "d"),
    "mole": ("pink", "<"),
    "loramoe": ("pink", ">"),
    "mixlora": ("pink", "p"),
    "molora": ("pink", "8"),
    "mov": ("pink", "H"),
    "moelora": ("pink", "D"),
    "mode": ("blue", "D"),
    "mode-anchored": ("blue", "*"),
}
"""Colour and marker by method. The colour is that of the kind of method."""


REFERENCES = (METHODS["sft"], METHODS["lora"])
"""Colours and markers of the methods that every figure names."""


OTHER = ("black", "o")
"""Colour and marker of any other method."""
