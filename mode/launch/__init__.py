"""Many runs: their order, their processes, and the machines that they go to."""
