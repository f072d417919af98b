"""What every operation and sampler costs, beside what else does the same: ``python -m benchmarks --help``.

One module per operation, named after it; `cases` says what a case is, `timing` how it is timed, `report` how it is
shown.
"""
