"""What all of effjax shares: errors, registries, configs, axis names, `SeqInfo`, `Cost`, trees.

Imports nothing else of effjax. `config`, `errors` and `registry` import neither jax nor flax, so
that `--help` and config errors are quick; nothing is re-exported here for the same reason.
"""
