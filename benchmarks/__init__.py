"""What every operation and sampler costs, beside what else does the same: ``python -m benchmarks --help``.

`ops` and `integrations` have a module for each, found by being there; `cases` says what a case is, `timing` how it is
timed, `report` how it is shown.
"""
