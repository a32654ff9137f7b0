"""effjax: efficient training in JAX and Flax, with every cost on the ledger.

Importing this package imports nothing heavy. Start with `python -m effjax.train --help`,
or from Python with `effjax.train.run(config, workdir)`.
"""

__version__ = '0.1.0'
