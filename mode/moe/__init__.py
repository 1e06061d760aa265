"""Other mixtures: low-rank banks, feed-forward and attention experts, ensembles, task routers."""
