"""What knows nothing of the project: errors, files, tensors, devices, processes."""
