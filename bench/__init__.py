"""Benchmarks, run as `python -m bench.<what>`; raw results in bench/results, the log in bench/LOG.md."""
