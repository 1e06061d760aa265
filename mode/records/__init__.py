"""Records of runs and other measurements: the only source of every number."""
