"""Suites of benchmarks, one module each."""
