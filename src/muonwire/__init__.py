"""Muon over slow links: optimizers as chains of stages, with every byte on the wire counted.

The rooms are imported by name, so that ``import muonwire`` stays cheap::

    from muonwire import codec, optim, polar, recipes, stages
"""

__version__ = "0.2.0"
