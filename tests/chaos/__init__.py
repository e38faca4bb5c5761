"""Chaos: real processes under every fault we can make, and a checker that believes none of them.

`python -m tests.chaos` (or `./dev chaos`) runs workers, beat, producers, Redis, PostgreSQL and the
simulator, breaks them by a seeded plan, lets everything come to rest, and compares three books
that know nothing of each other: the producers' journals, the simulator's ledger, and SQL.
"""
