"""Benchmarks: what a metagradient costs, beside other ways to compute it. See benchmarks/README.md."""
