"""Finished runs and saved models: find, edit, prune and export them."""
