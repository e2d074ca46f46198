"""Benchmarks: what Flexrun costs on this machine, against limits measured in the same minute."""
