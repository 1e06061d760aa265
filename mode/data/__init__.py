"""From sources to batches: documents, splits, deduplication, tokens and memory-mapped arrays."""
