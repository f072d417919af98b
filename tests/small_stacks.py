"""Calls all compiled functions from threads whose stacks have as many bytes as the argument says.

The name of each call is printed before it is made, so the last name is the call that crashed. OMP_STACKSIZE sets the
stacks of OpenMP's threads.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator

import numpy
import torch

from fastguide import ops
from fastguide.integrations import particles
from fastguide.ops import _native
from fastguide.ops._arguments import STATE_DTYPES, WEIGHT_DTYPES
from fastguide.reference import FAMILIES, SCHEMES

LEVELS = (0.5, 0.8, 0.9, 0.4, 0.2)


def torch_calls(x: torch.Tensor) -> None:
    """Calls of torch with equally many elements. If a thread does not survive these, the other calls say nothing."""
    y = (x * 2 + torch.randn_like(x)).clamp(-1, 1).exp()
    y.float().sort(dim=1).values.cumsum(1).logsumexp(1)
    y.index_select(1, torch.randint(x.shape[1], (x.shape[1],)))


def calls() -> Iterator[tuple[str, functools.partial]]:
    """Names and calls. A call that is large enough runs on two threads."""
    call = functools.partial
    for dtype in STATE_DTYPES:
        # short particles, particles of less than a tile, of many tiles, and a state larger than the caches
        shapes = ((3, 5), (9000, 5), (40, 700), (8, 9001), (80, 30_000))
        for shape in shapes if dtype == torch.float32 else shapes[:-1]:
            x = torch.randn(shape).to(dtype)
            other, about = x.flip(0), f"{dtype} {list(shape)}"
            small = x.numel() < 1_000_000
            if small:
                yield f"torch {about}", call(torch_calls, x)
            yield f"randn {about}", call(ops.randn, shape, seed=1, dtype=dtype)
            for clip in (None, 1.0, ops.DynamicThreshold(0.9, 3.0)) if small else (None,):
                for levels in (LEVELS, (torch.full((shape[0],), 0.5), *LEVELS[1:])):
                    step = call(ops.reverse_step, x, other, levels, clip=clip, displacement=other.half(), seed=1)
                    kind = "levels of each" if levels is not LEVELS else "one level"
                    yield f"reverse_step {about}, {clip}, {kind}", call(step, clip_noise=False, return_x0=True)
                    guided = call(step, unconditional=other.double(), guidance_scale=2.0)
                    yield f"reverse_step {about}, {clip}, {kind}, guided", guided
            levels = (torch.full((shape[0],), 0.5), 0.8)
            convert = call(ops.predict_x0, x, other.half(), levels, prediction="v", unconditional=other.double())
            yield f"predict_x0 {about}", call(convert, guidance_scale=2.0)
            weights = torch.zeros(shape[0])
            yield f"propose_and_weigh {about}", call(ops.propose_and_weigh, x, other, other, weights, LEVELS, seed=1)
            y = x.abs().to(torch.float64 if dtype == torch.float64 else torch.float32)
            rows = torch.arange(shape[0]).flip(0)
            for family in FAMILIES:
                density = call(ops.log_prob_and_gradient, x, family=family, scale=0.3)
                density = call(density, df=3.0) if family == "student_t" else density
                for name, values in (("one y", y[:1]), ("rows of y", y)):
                    more = dict(rows=rows) if values is y else {}
                    if family != "poisson":
                        more["extra_variance"] = values
                    yield f"log_prob_and_gradient {about}, {family}, {name}", call(density, values, **more)

    for dtype in WEIGHT_DTYPES:
        for shape in ((2, 7), (600, 1000), (2, 40_000), (1, 300_000)):
            weights = torch.randn(shape).to(dtype)
            for scheme in SCHEMES:
                for order in (True, False):
                    resample = call(ops.resample, weights, scheme=scheme, sorted=order, seed=1)
                    yield f"resample {dtype} {list(shape)}, {scheme}, sorted={order}", resample
    for particle in ((), (3,), (1500,)):
        for count in (7, 10_000):
            state = torch.randn(1, count, *particle)
            maps = dict(permutation=torch.randperm(count), ascending=torch.randint(count, (count,)).sort().values)
            maps["survivors"] = torch.where(torch.isin(torch.arange(count), maps["ascending"]), torch.arange(count), 0)
            for name, ancestors in maps.items():
                for dtype in (torch.int32, torch.int64):
                    gather = call(ops.gather_particles_, ancestors.to(dtype)[None], state)
                    yield f"gather_particles_ {dtype} {list(state.shape)}, {name}", gather

    for count in (7, 70_000):
        weights = numpy.random.default_rng(0).random(count)
        weights /= weights.sum()
        for scheme in ("systematic", "stratified", "multinomial", "residual", "killing", "ssp"):
            yield f"particles {scheme} {count}", call(getattr(particles, scheme), weights)
        for name in ("exp_and_normalise", "essl", "log_mean_exp"):
            yield f"particles {name} {count}", call(getattr(particles, name), numpy.log(weights))


def main() -> None:
    torch.set_num_threads(2)
    threading.stack_size(int(sys.argv[1]))
    made = list(calls())
    for _, call in {call.func: (name, call) for name, call in made}.values():
        call()  # imports at the first call need a larger stack
    for isa in _native.instruction_sets():
        with _native.instruction_set(isa):
            for name, call in made:
                if call.func is torch_calls and isa != _native.instruction_sets()[0]:
                    continue  # the same code for each
                print(isa, name, flush=True)
                failed: list[BaseException] = []
                thread = threading.Thread(target=attempt, args=(call, failed))
                thread.start()
                thread.join()
                if failed:
                    raise failed[0]
    print("all done")


def attempt(call: Callable[[], object], failed: list[BaseException]) -> None:
    try:
        call()
    except BaseException as error:
        failed.append(error)


if __name__ == "__main__":
    main()
