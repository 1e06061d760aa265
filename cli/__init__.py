"""The command line. Its import is fast: heavy modules are imported inside commands."""
