"""The proof on a GPU, ``make gpu``: ``python -m ddst.benchmarks.gpu --help``.

run.py builds and starts it from a working tree; __main__.py runs the parts in order. correctness.py (on problems.py),
sweep.py and primitives.py check; kernel_rows.py, host_time.py, iteration.py (on networks.py) and training.py measure.
timing.py holds the clock, workers.py the processes that compile and check at once, budget.py the time that is left;
objects.py carries what is compiled from one run to the next, journal.py what is proven; results.py, table.py and
pictures.py write what is kept.
"""
