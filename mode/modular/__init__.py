"""MoDE itself: blocks of branches, experts, the modular model, and its artefacts."""
