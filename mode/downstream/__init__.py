"""Downstream tasks: score finished runs on benchmarks such as HumanEval and GSM8K."""
