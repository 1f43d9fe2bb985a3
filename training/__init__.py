"""How the network is trained, measured and reported. May import `model`; nothing imports this package."""

__version__ = "0.3.0"
"""Of what a training checkpoint holds: a run of another one is not resumed. The package's own is `app.__version__`."""
