"""Utilities that know nothing of the project: errors, files, tensors, devices, processes."""
