"""The command line: thin, and nothing heavy at import."""
