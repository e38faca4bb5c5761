"""Benchmarks, which `./dev bench NAME` runs; no part of the tests. Each says what it wants.

A benchmark NAME is the module `bench_NAME` with `main(words) -> int`: its exit status.
"""
