"""Tests: tiny models and text made on the fly; no network."""
