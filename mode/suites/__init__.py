"""The suites of `mode bench`: each makes a list of what is to be timed in turn."""
