"""From sources to batches: documents, splits, duplicates, tokens, memory-mapped arrays."""
