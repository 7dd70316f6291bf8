"""Measures what a differentially private training run leaks, with canaries found by metagradient descent."""

# Importing the package imports nothing else, so that a workflow may read the version at no cost.
__version__ = "0.1.0"
