"""Hyperparameter search and graceful forgetting for Continual Learning via Neural Pruning.

The command line is `clnp_search.cli`, the method itself `clnp_search.clnp`. Importing this package imports neither.
"""
