"""Benchmarks of ddst's operators against dense torch; each module runs as ``python -m ddst.benchmarks.<name>``."""
