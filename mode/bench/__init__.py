"""Benchmarks: ratios of times, measured interleaved, and memory."""
