"""The compiled libraries, put here by the build: ``libddst.so`` (operators) and ``_host`` (one per CPython)."""
