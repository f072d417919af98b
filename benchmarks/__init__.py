"""What every operation and sampler costs, compared with alternatives: ``python -m benchmarks --help``.

`ops` and `integrations` have one module for each; every module that is there is run. `cases` defines a case, `timing`
measures it, `report` shows it.
"""
