"""Scores of a finished model, and text that it generates."""
