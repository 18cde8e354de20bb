"""What the benchmarks share: their settings, judges, peers and tables."""
