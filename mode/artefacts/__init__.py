"""Finished runs as parts: found, edited, pruned and written as model folders."""
