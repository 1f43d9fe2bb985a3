"""`python -m training` is `convmixer-train` where nothing is installed."""

from training.cli import main

main()
