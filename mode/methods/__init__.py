"""What may be asked for: the base of every method, MoDE, anchoring, pretraining."""
