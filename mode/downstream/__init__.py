"""Downstream tasks: prompts, scoring, and programs run in a sandbox."""
