"""Benchmarks of ddst against dense torch: ``python -m ddst.benchmarks --help``.

registry.py says what there is to measure, problem.py makes its tensors and programs, runner.py measures one case,
memory.py keeps freed memory meanwhile, report.py and picture.py show what came out, against.py compares two builds,
memory_over_time.py watches the memory of many iterations, bench_layers.py is for pytest-benchmark.
"""
