"""FKD against closed forms, on chains with few states, so that all paths can be counted."""

import enum
import inspect
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from benchmarks.integrations.fkd import PlainFKD
from fastguide.integrations.fkd import FKD

POTENTIALS = ("diff", "max", "add", "rt")


def _fkd(**changed):
    arguments = dict(
        potential_type="diff",
        lmbda=2.0,
        num_particles=4,
        adaptive_resampling=True,
        resample_frequency=2,
        resampling_t_start=1,
        resampling_t_end=5,
        time_steps=10,
        reward_fn=lambda images: images[:, 0],
        device="cpu",
        seed=0,
    )
    return FKD(**{**arguments, **changed})


def _column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_steps_that_weigh():
    fkd = _fkd()
    x = _column(0.0, 0.1, 0.2, 0.3)
    weighed = []
    for i in range(10):
        latents, images = fkd.resample(sampling_idx=i, latents=x, x0_preds=x)
        if images is None:
            assert latents is x
        else:
            weighed.append(i)
    assert weighed == [1, 3, 5, 9]
    assert fkd.resample(sampling_idx=torch.tensor(5), latents=x, x0_preds=x)[1] is not None
    with pytest.raises(ValueError, match="sampling_idx: expected"):
        fkd.resample(sampling_idx=5.5, latents=x, x0_preds=x)
    assert _fkd(resampling_t_end=4).steps == {1, 3, 9}
    assert _fkd(resampling_t_end=9).steps == {1, 3, 5, 7, 9}


@pytest.mark.parametrize("potential", POTENTIALS)
def test_product_of_potentials(potential):
    """It is ``exp(lmbda * r(x_0))``. There is only one particle, so no other one replaces it."""
    for minimum in (0.0, -3.0):
        fkd = _fkd(potential_type=potential, num_particles=1, reward_min_value=minimum)
        for i, reward in ((1, 0.3), (3, -0.4), (5, 1.7), (9, 0.9)):
            fkd.resample(sampling_idx=i, latents=_column(0.0), x0_preds=_column(reward))
        expected = 2.0 * (0.9 - (minimum if potential == "diff" else 0.0))
        assert fkd.log_weights.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("potential", "expected"),
    [
        ("diff", [[0.4, 0.6], [-0.6, 0.2]]),
        ("max", [[0.4, 0.6], [0.4, 0.8]]),
        ("add", [[0.4, 0.6], [0.2, 1.4]]),
        ("rt", [[0.4, 0.6], [-0.2, 0.8]]),
    ],
)
def test_log_potentials_and_weights_that_are_kept(potential, expected):
    """Rewards 0.2, 0.3 and then -0.1, 0.4. The weights are too even to resample."""
    fkd = _fkd(potential_type=potential, num_particles=2)
    total = torch.zeros(2, dtype=torch.float64)
    for i, rewards, log_potential in zip((1, 3), ((0.2, 0.3), (-0.1, 0.4)), expected, strict=True):
        x = _column(*rewards)
        latents, images = fkd.resample(sampling_idx=i, latents=x + 5.0, x0_preds=x)
        total += torch.tensor(log_potential)
        torch.testing.assert_close(fkd.log_weights, total, rtol=0, atol=1e-6)
        assert torch.equal(latents, x + 5.0) and torch.equal(images, x)


@pytest.mark.parametrize(
    ("potential", "forced", "adaptive"),
    [
        ("diff", 0.9 - 1.7, 0.9 - 1.7),
        ("max", 1.7 - (0.3 + 0.3 + 1.7), 1.7),
        ("add", 2.5 - (0.3 - 0.1 + 1.6), 2.5),
        ("rt", 0.9 - (0.3 - 0.4 + 1.7), 0.9),
    ],
)
def test_last_weight_of_the_original(potential, forced, adaptive):
    """With one particle. The last weight is divided by the potentials of the steps that resampled. An adaptive step
    never resamples one particle, so it has no such steps."""
    for expected, changed in ((forced, {"adaptive_resampling": False}), (adaptive, {})):
        fkd = _fkd(potential_type=potential, num_particles=1, strict=True, seed=None, **changed)
        for i, reward in ((1, 0.3), (3, -0.4), (5, 1.7), (9, 0.9)):
            fkd.resample(sampling_idx=i, latents=_column(0.0), x0_preds=_column(reward))
        assert fkd.log_weights.item() == pytest.approx(2.0 * expected, abs=1e-5)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choices_of_the_original(potential, adaptive, dtype):
    generator = torch.Generator().manual_seed(0)
    latents, reward = torch.arange(16), lambda images: images[:, 0]
    fkd = _fkd(potential_type=potential, num_particles=16, strict=True, seed=None, adaptive_resampling=adaptive)
    plain = PlainFKD(potential, 2.0, reward, latents, last_step=9, adaptive=adaptive)
    moved = 0
    for seed, i in enumerate((1, 3, 5, 9)):
        x0 = torch.randn(16, 2, generator=generator, dtype=dtype)
        results = []
        for resampler in (fkd, plain):
            torch.manual_seed(seed)
            results.append(resampler.resample(sampling_idx=i, latents=latents, x0_preds=x0))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(fkd.population_rs, plain.rewards)
        moved += not torch.equal(results[0][0], latents)
    assert moved >= 2


@pytest.mark.filterwarnings("ignore:reward_fn. returned NaN for 1 of 4 particles at step 1:RuntimeWarning")
def test_the_original_forgets_weights_and_clamps_them():
    fkd = _fkd(num_particles=2, strict=True, seed=None)
    for i, rewards in ((1, (0.2, 0.3)), (3, (0.1, 0.4))):
        fkd.resample(sampling_idx=i, latents=_column(0, 1), x0_preds=_column(*rewards))
    torch.testing.assert_close(fkd.log_weights, 2.0 * torch.tensor([-0.1, 0.1], dtype=torch.float64), rtol=0, atol=1e-6)

    rewards = _column(12.0, 40.0, 11.0, float("nan"))  # weights exp(24), exp(80), exp(22) and 0
    for seed in range(20):
        torch.manual_seed(seed)
        strict, ours = _fkd(strict=True, seed=None, adaptive_resampling=False), _fkd(seed=seed)
        latents = torch.arange(4.0)
        kept = strict.resample(sampling_idx=1, latents=latents, x0_preds=rewards)[0]
        torch.manual_seed(seed)
        clamped = torch.tensor([1e10, 1e10, math.exp(22.0), 0.0])
        assert torch.equal(kept, latents[torch.multinomial(clamped, 4, replacement=True)])
        assert ours.resample(sampling_idx=1, latents=latents, x0_preds=rewards)[0].tolist() == [1.0] * 4


def test_the_original_resamples_last_only_below_half():
    even, uneven = _column(0.0, 0.1, 0.1, 0.0), _column(0.0, 9.0, 0.0, 0.0)
    latents = torch.arange(4.0)
    for adaptive in (True, False):
        strict = _fkd(strict=True, seed=None, adaptive_resampling=adaptive)
        assert strict.resample(sampling_idx=9, latents=latents, x0_preds=even)[0] is latents
        strict = _fkd(strict=True, seed=None, adaptive_resampling=adaptive)
        assert strict.resample(sampling_idx=9, latents=latents, x0_preds=uneven)[0].tolist() == [1.0] * 4
    strict = _fkd(strict=True, seed=None)
    assert strict.resample(sampling_idx=1, latents=latents, x0_preds=even)[0] is latents


def _chain(fkd, generator, particles):
    """A random walk over the states 0, 1, 2. The reward at each step is that of the current state."""
    x = torch.randint(3, (particles,), generator=generator)
    for i in range(fkd.last_step + 1):
        x = torch.multinomial(TRANSITION[x], 1, generator=generator)[:, 0]
        x = fkd.resample(sampling_idx=i, latents=x, x0_preds=x)[0]
    return x


TRANSITION = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.3, 0.6]], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.2, -0.7], dtype=torch.float64)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("scheme", ["systematic", "multinomial"])
def test_target_of_a_discrete_chain(potential, adaptive, scheme):
    steps, particles = 4, 40_000
    lmbda = 0.3 if potential == "add" else 1.0  # with "add" the weights vary most during the run
    fkd = _fkd(
        potential_type=potential,
        lmbda=lmbda,
        num_particles=particles,
        adaptive_resampling=adaptive,
        resample_frequency=1,
        resampling_t_start=0,
        resampling_t_end=steps,
        time_steps=steps,
        reward_fn=lambda x: REWARD[x],
        scheme=scheme,
    )
    x = _chain(fkd, torch.Generator().manual_seed(1), particles)
    prior = torch.full((3,), 1 / 3, dtype=torch.float64) @ torch.linalg.matrix_power(TRANSITION, steps)
    tilted = prior * (lmbda * REWARD).exp()
    shares = torch.bincount(x, minlength=3) / particles
    torch.testing.assert_close(shares.double(), tilted / tilted.sum(), rtol=0, atol=0.025)
    assert fkd.log_weights.unique().numel() == 1
    assert fkd.log_weights[0].item() == pytest.approx(math.log(tilted.sum()), abs=0.03)


@pytest.mark.parametrize("name", ["latent_to_decode_fn", "reward_fn"])
def test_a_function_that_writes_into_the_predictions_is_an_error(name):
    functions = {"latent_to_decode_fn": lambda x: x, "reward_fn": lambda x: x.flatten(1).sum(1)}
    functions[name] = lambda x, f=functions[name]: f(x.clamp_(0.0, 1.0))
    fkd = _fkd(**functions)
    with pytest.raises(ValueError, match=r"latent_to_decode_fn, reward_fn: expected functions that leave x0_preds"):
        fkd.resample(sampling_idx=1, latents=torch.arange(4), x0_preds=torch.full((4, 2, 2), 3.0))


def test_images_may_be_a_list_and_rewards_too():
    fkd = _fkd(
        lmbda=50.0,
        latent_to_decode_fn=lambda x0: [f"image {k}" for k in range(len(x0))],
        reward_fn=lambda images: [float(image == "image 2") for image in images],
    )
    latents = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).half()
    kept = latents.clone()
    new, images = fkd.resample(sampling_idx=1, latents=latents, x0_preds=latents)
    assert images == ["image 2"] * 4
    assert new.dtype == torch.half and torch.equal(new, kept[[2, 2, 2, 2]])
    assert torch.equal(latents, kept)  # the caller's own latents are unchanged


@pytest.mark.filterwarnings("ignore:reward_fn:RuntimeWarning")
def test_dead_particles():
    fkd = _fkd(reward_fn=lambda x: torch.tensor([math.nan, 0.0, math.nan, -math.inf]), adaptive_resampling=False)
    assert fkd.resample(sampling_idx=1, latents=torch.arange(4), x0_preds=_column(*range(4)))[0].tolist() == [1] * 4
    fkd = _fkd(reward_fn=lambda x: [math.nan] * 4)
    assert fkd.resample(sampling_idx=1, latents=torch.arange(4), x0_preds=_column(*range(4)))[0].tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@pytest.mark.parametrize("strict", [False, True])
def test_unusable_rewards_are_warned_of(device, strict):
    """On the CPU the warning comes at once. On a GPU it comes after the last step, so that no other step waits."""
    given = {1: (math.nan, 0.0, math.nan, 1.0), 3: (0.0, 0.1, 0.0, 0.2), 5: (math.nan,) * 4, 9: (0.0, 0.0, 0.0, 0.0)}
    if strict:
        given[5] = given[3]  # the original raises if no weight is above 0
    options = dict(strict=True, seed=None) if strict else {}
    fkd = _fkd(reward_fn=lambda x: x[:, 0], device=device, **options)
    seen = {}
    for step, rewards in given.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fkd.resample(sampling_idx=step, latents=torch.arange(4), x0_preds=_column(*rewards).to(device))
        assert all(warning.category is RuntimeWarning and warning.filename == __file__ for warning in caught)
        seen[step] = [str(warning.message) for warning in caught]
    some = "reward_fn: returned NaN for 2 of 4 particles at step 1. They got weight 0"
    none = (
        "reward_fn: expected rewards whose largest weight is finite at step 5, got none (4 of 4 rewards are NaN). "
        "The step does not count: all particles were kept"
    )
    five = [] if strict else [none]
    expected = {1: [some], 3: [], 5: five, 9: []} if device == "cpu" else {1: [], 3: [], 5: [], 9: [some, *five]}
    assert seen == expected


@pytest.mark.filterwarnings("ignore:reward_fn. expected rewards whose largest weight is finite:RuntimeWarning")
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("rewards", [(math.nan,) * 4, (0.0, math.inf, 1.0, 2.0)])
def test_a_step_without_usable_rewards_does_not_count(potential, adaptive, rewards):
    """The step is between two others. The weights of the first are too even to resample."""
    runs = []
    for middle in ([(3, rewards)], []):
        fkd = _fkd(potential_type=potential, adaptive_resampling=adaptive)
        for i, given in [(1, (0.1, 0.2, 0.0, 0.1)), *middle, (5, (0.0, 0.0, 9.0, 0.0))]:
            kept = fkd.resample(sampling_idx=i, latents=torch.arange(4), x0_preds=_column(*given))[0]
        runs.append((kept, fkd.log_weights, fkd.population_rs))
    assert runs[0][0].tolist() == [2] * 4
    for got, expected in zip(*runs, strict=True):
        assert torch.equal(got, expected)


REWARDS = {
    "list": lambda images: [float(v) for v in images[:, 0]],
    "numpy, backwards": lambda images: images[:, 0].numpy()[::-1].copy()[::-1],
    "numpy, read only": lambda images: np.broadcast_to(images[:, 0].numpy(), (4,)),
    "list of numpy": lambda images: list(images[:, 0].numpy()),
    "list of tensors": lambda images: list(images[:, 0].clone().requires_grad_()),
    "tuple of both": lambda images: (0.3, *images[1:, 0]),
    "float32": lambda images: images[:, 0].float(),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_of_many_kinds(kind):
    """Python numbers keep float64 precision."""
    rewards = [0.3, 0.1, 0.2, 0.25]
    fkd = _fkd(reward_fn=REWARDS[kind])
    fkd.resample(sampling_idx=1, latents=torch.arange(4), x0_preds=_column(*rewards))
    expected = 2.0 * torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(fkd.log_weights, expected, rtol=0, atol=1e-6 if kind == "float32" else 1e-15)


@pytest.mark.parametrize("bad", [None, ["a", "b", "c", "d"], 1.0, torch.ones(4) * 1j, np.ones(4) * 1j])
def test_rewards_that_are_no_numbers(bad):
    with pytest.raises((TypeError, ValueError), match=r"^reward_fn: expected"):
        _fkd(reward_fn=lambda images: bad).resample(
            sampling_idx=1, latents=torch.arange(4), x0_preds=_column(0.0, 1.0, 2.0, 3.0)
        )


@pytest.mark.parametrize("strict", [False, True])
def test_rewards_in_memory_that_is_used_again(strict):
    """The reward function returns the same memory at each step. ``"diff"`` needs the rewards of the step before."""
    memory = torch.empty(4)
    options = dict(strict=True, seed=None) if strict else {}
    fkd = _fkd(reward_fn=lambda images: memory.copy_(images[:, 0]), **options)
    for step, rewards in ((1, (0.0, 0.1, 0.2, 0.3)), (3, (0.3, 0.3, 0.3, 0.3))):
        fkd.resample(sampling_idx=step, latents=torch.arange(4), x0_preds=_column(*rewards))
    expected = [0.6, 0.4, 0.2, 0.0] if strict else [0.6] * 4  # the original's weights are only of the last step
    torch.testing.assert_close(fkd.log_weights, torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_ancestors(strict):
    options = dict(strict=True, seed=None) if strict else {}
    fkd = _fkd(**options)
    assert fkd.ancestors is None
    latents, names = torch.arange(4), list("abcd")
    steps = {
        0: ((0.0, 9.0, 0.0, 0.0), None),  # does not weigh
        1: ((0.0, 0.1, 0.1, 0.0), [0, 1, 2, 3]),  # too even
        3: ((0.0, 9.0, 0.0, 0.0), [1, 1, 1, 1]),
        4: ((9.0, 0.0, 0.0, 0.0), [1, 1, 1, 1]),  # does not weigh: ancestors of step 3 stay
    }
    for step, (rewards, expected) in steps.items():
        before = latents
        latents, images = fkd.resample(sampling_idx=step, latents=latents, x0_preds=_column(*rewards))
        if images is not None:
            assert torch.equal(latents, before[fkd.ancestors])
            names = [names[k] for k in fkd.ancestors.tolist()]
        if expected is not None:
            assert fkd.ancestors.dtype == torch.int64 and fkd.ancestors.tolist() == expected
    assert names == ["b"] * 4


def test_a_step_taken_again_draws_other_numbers():
    x = _column(*(0.05 * k for k in range(64)))
    fkd = _fkd(num_particles=64, scheme="multinomial", adaptive_resampling=False, potential_type="rt", seed=3)
    drawn = []
    for _ in range(2):
        fkd.log_weights.zero_()
        fkd.resample(sampling_idx=1, latents=x, x0_preds=x)
        drawn.append(fkd.ancestors)
    assert not torch.equal(*drawn)


def test_no_two_visits_draw_the_same_numbers():
    """Steps may go on after the last of ``time_steps``."""
    x = _column(*(0.05 * k for k in range(64)))
    options = dict(num_particles=64, scheme="multinomial", adaptive_resampling=False, potential_type="rt")
    fkd = _fkd(**options, resample_frequency=1, resampling_t_start=0, resampling_t_end=6, time_steps=3)
    drawn = []
    for step in (0, 0, 1, 2, 2, 3, 4, 5, 6):
        fkd.log_weights.zero_()
        fkd.resample(sampling_idx=step, latents=x, x0_preds=x)
        drawn.append(fkd.ancestors)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_rewards_are_the_callers_own():
    images = _column(0.0, 1.0, 2.0, 3.0).requires_grad_()
    for strict in ({}, {"strict": True, "seed": None}):
        fkd = _fkd(potential_type="add", **strict)
        fkd.resample(sampling_idx=1, latents=torch.arange(4), x0_preds=images)
        assert not fkd.population_rs.requires_grad and not fkd.log_weights.requires_grad


def test_seeds():
    x = _column(*(0.05 * k for k in range(64)))

    def draw(step=9, **seed):
        fkd = _fkd(num_particles=64, scheme="multinomial", adaptive_resampling=False, **seed)
        return fkd.resample(sampling_idx=step, latents=x, x0_preds=x)[0]

    torch.manual_seed(3)
    drawn = [draw(seed=None), draw(seed=None), draw(seed=1), draw(seed=2), draw(step=1, seed=2)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    torch.manual_seed(3)
    assert torch.equal(draw(seed=None), drawn[0]) and torch.equal(draw(seed=2), drawn[3])


def test_without_a_device_it_is_on_cuda_or_else_on_the_cpu():
    """The original's default is CUDA."""
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert _fkd(device=None).log_weights.device.type == expected
    assert inspect.signature(FKD).parameters["device"].default is None


def test_other_keywords_and_errors():
    fkd = _fkd(use_smc=True, output_dir="here", potential_type=enum.Enum("PotentialType", {"MAX": "max"}).MAX)
    assert fkd.potential_type == "max"
    with pytest.raises(ValueError, match="potential_type: expected one of"):
        _fkd(potential_type="difference")
    with pytest.raises(ValueError, match="scheme: expected one of"):
        _fkd(scheme="killing")
    with pytest.raises(ValueError, match="strict: expected neither"):
        _fkd(strict=True)
    for name, value in (
        ("resample_frequency", 0),
        ("resample_frequency", -1),
        ("resample_frequency", 1.5),
        ("time_steps", 0),
        ("num_particles", 0),
        ("lmbda", math.nan),
        ("lmbda", math.inf),
        ("reward_min_value", math.nan),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}"):
            _fkd(**{name: value})
    with pytest.raises(ValueError, match="latents: expected 4 particles"):
        _fkd().resample(sampling_idx=1, latents=_column(1, 2), x0_preds=_column(1, 2, 3, 4))
    with pytest.raises(ValueError, match="x0_preds: expected 4 particles"):
        _fkd().resample(sampling_idx=1, latents=_column(1, 2, 3, 4), x0_preds=_column(1, 2))
    with pytest.raises(ValueError, match="reward_fn: expected 4 rewards"):
        _fkd(reward_fn=lambda x: x).resample(sampling_idx=1, latents=_column(1, 2, 3, 4), x0_preds=_column(1, 2, 3, 4))
