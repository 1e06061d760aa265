"""The library: Modular Domain Experts (MoDE), one training loop, evaluation, records and report."""

__version__ = "0.1.0"
