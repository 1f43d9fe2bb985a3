"""How the network is trained, measured and reported. May import `model`; nothing imports this package."""

__version__ = "0.3.0"
