"""``python -m benchmarks.integrations_particles``: a million weights through `particles` and the drop-in for it, in
turn; medians in ms, after a check that both return the same.
"""

import statistics
from functools import partial

import numpy as np
import torch
from particles import resampling as theirs

from benchmarks.timing import alternate, keep_memory
from fastguide.integrations import particles as ours


def main() -> None:
    print(f"allocator: {keep_memory()}\n")
    log_weights = np.random.default_rng(0).standard_normal(1_000_000)
    weights = theirs.exp_and_normalise(log_weights)
    print("| | particles | fastguide | |\n| --- | --- | --- | --- |")
    for name in (*ours.SCHEMES, "exp_and_normalise", "essl", "log_mean_exp"):
        values = weights if name in ours.SCHEMES else log_weights
        functions = {"particles": getattr(theirs, name), "fastguide": getattr(ours, name)}
        results = []
        for function in functions.values():
            np.random.seed(0)
            results.append(function(values))
        if name != "ssp":  # its generator is numba's, which this does not seed
            np.testing.assert_array_equal(*results)
        calls = {who: partial(function, values) for who, function in functions.items()}
        samples, broken = alternate(calls, torch.device("cpu"), seconds=2.0)
        assert not broken, broken
        before, after = (1e3 * statistics.median(samples[who]) for who in functions)
        print(f"| `{name}` | {before:.1f} | {after:.1f} | {before / after:.1f}x |")


if __name__ == "__main__":
    main()
