"""Schedules against formulas computed here, against diffusers, and conditions that lists of levels must satisfy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguide import schedules
from fastguide.schedules import SPACINGS

ZERO_TERMINAL = np.append(np.linspace(0.999, 0.01, 19) ** 2, 0.0)

# Every class; each way to make a table, and one whose last alpha is 0.
SCHEDULES = {
    "vp_linear": schedules.vp_linear(1000),
    "vp_scaled_linear": schedules.vp_scaled_linear(1000),
    "vp_cosine": schedules.vp_cosine(200),
    "zero terminal SNR": schedules.from_alphas_cumprod(ZERO_TERMINAL),
    "ve": schedules.ve(0.02, 30.0),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
}
TABLES = ("vp_linear", "vp_scaled_linear", "vp_cosine", "zero terminal SNR")

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_table = pytest.mark.parametrize("schedule", [SCHEDULES[n] for n in TABLES], ids=TABLES)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def linear_betas(n, low=1e-4, high=0.02):
    return [low + (high - low) * i / (n - 1) for i in range(n)]


def scaled_linear_betas(n, low=0.00085, high=0.012):
    return [(math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * i / (n - 1)) ** 2 for i in range(n)]


def cosine_betas(n, s=0.008, most=0.999):
    def f(t):
        return math.cos((t / n + s) / (1 + s) * math.pi / 2) ** 2

    return [min(1 - f(t + 1) / f(t), most) for t in range(n)]


# --- the levels themselves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, betas",
    [
        (schedules.vp_linear, linear_betas),
        (schedules.vp_scaled_linear, scaled_linear_betas),
        (schedules.vp_cosine, cosine_betas),
    ],
)
@pytest.mark.parametrize("n", [7, 1000])
def test_vp_tables_are_the_products_of_their_betas(make, betas, n):
    schedule, bar = make(n), 1.0
    for t, beta in enumerate(betas(n)):
        bar *= 1.0 - beta
        assert schedule.alpha(t) == pytest.approx(math.sqrt(bar), rel=1e-10)
        assert schedule.sigma(t) == pytest.approx(math.sqrt(1.0 - bar), rel=1e-10)


@pytest.mark.parametrize(
    "make, name, options",
    [
        (schedules.vp_linear, "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        (schedules.vp_scaled_linear, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        (schedules.vp_cosine, "squaredcos_cap_v2", {}),
    ],
)
def test_vp_tables_are_those_of_diffusers(make, name, options):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(1000, beta_schedule=name, **options).alphas_cumprod.double().numpy()
    ours = make(1000)
    # diffusers multiplies a thousand float32 factors.
    np.testing.assert_allclose(ours.alpha(np.arange(1000)) ** 2, theirs, rtol=1e-4, atol=1e-8)
    if name != "squaredcos_cap_v2":  # in float32 its last entry rounds to 0
        table = schedules.from_alphas_cumprod(torch.as_tensor(theirs))
        np.testing.assert_array_equal(table.alpha(np.arange(1000)), np.sqrt(theirs))


@every_table
def test_tables_preserve_variance(schedule):
    t = np.arange(-1, schedule.t_max + 1)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, atol=4e-16)


@pytest.mark.parametrize("name", ["ve", "edm"])
def test_variance_exploding(name):
    schedule = SCHEDULES[name]
    t = np.geomspace(schedule.t_min, schedule.t_max, 11)
    np.testing.assert_array_equal(schedule.sigma(t), t)
    np.testing.assert_array_equal(schedule.alpha(t), 1.0)


def test_flow():
    t = np.linspace(0, 1, 11)
    np.testing.assert_array_equal(SCHEDULES["flow"].alpha(t), 1 - t)
    np.testing.assert_array_equal(SCHEDULES["flow"].sigma(t), t)


@every_schedule
def test_clean_level(schedule):
    assert schedule.alpha(schedule.clean) == 1.0
    assert schedule.sigma(schedule.clean) == 0.0


# All schedules take times in the same way: every dtype is tested with one schedule, and integers with every schedule.
@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [
        *((schedule, torch.int64) for schedule in SCHEDULES.values()),
        *((SCHEDULES["flow"], dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    ],
)
def test_alpha_and_sigma_keep_kind_and_shape(schedule, dtype):
    times = torch.tensor([[1, 0], [0, 1]], dtype=dtype)
    for f in (schedule.alpha, schedule.sigma):
        values = f(times)
        assert values.dtype == torch.float64
        expected = [[f(1), f(0)], [f(0), f(1)]]
        assert isinstance(f(1), float)
        assert values.tolist() == expected
        np.testing.assert_array_equal(f(np.array([[1.0, 0.0], [0.0, 1.0]])), expected)
        assert f([1, 0]).tolist() == expected[0]


@every_schedule
def test_values_share_no_memory_with_the_times(schedule):
    times = np.ones(3)
    schedule.sigma(times)[:] = 0.0
    assert times.tolist() == [1.0] * 3


def test_the_table_is_read_only_and_not_the_callers():
    table = np.array([0.9, 0.5])
    schedule = schedules.from_alphas_cumprod(table)
    table[0] = 0.6
    assert schedule.alphas_cumprod.tolist() == [0.9, 0.5]
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.6


# --- lists of levels ----------------------------------------------------------------------------------------


@every_schedule
@every_spacing
@pytest.mark.parametrize("steps", [1, 2, np.int64(20)])  # only the first level, the fewest that are spaced, many
def test_levels_descend_from_the_top_to_the_clean_one(schedule, spacing, steps):
    levels = schedule.levels(steps, spacing)
    assert len(levels) == steps + 1
    assert levels[0].t == schedule.t_max
    assert levels[-1] == (schedule.clean, 1.0, 0.0)
    assert np.all(np.diff([level.t for level in levels]) < 0)
    # sigma / alpha falls strictly; written without a division because alpha may be 0
    for high, low in itertools.pairwise(levels):
        assert high.sigma * low.alpha > low.sigma * high.alpha
    for level in levels:
        assert (level.alpha, level.sigma) == (schedule.alpha(level.t), schedule.sigma(level.t))
        assert type(level.t) is (int if schedule.discrete else float)
        assert type(level.alpha) is float and type(level.sigma) is float


def ratios(levels):
    return np.array([level.sigma / level.alpha for level in levels])


@pytest.mark.parametrize("name", ["ve", "edm"])
@pytest.mark.parametrize("steps", [2, 18])
def test_karras_levels(name, steps):
    """Equal to Karras et al. 2022, eq. 5, with N steps and rho = 7."""
    schedule = SCHEDULES[name]
    low, high = schedule.t_min ** (1 / 7), schedule.t_max ** (1 / 7)
    expected = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)]
    levels = schedule.levels(steps, "karras")
    np.testing.assert_allclose([level.sigma for level in levels], [*expected, 0.0], rtol=1e-12)


@pytest.mark.parametrize("name, rho", [("ve", None), ("flow", None), ("flow", 7.0)])
def test_spacings_are_uniform_in_their_variable(name, rho):
    schedule = SCHEDULES[name]
    inner = ratios(schedule.levels(13, "karras" if rho else "logsnr")[1:-1])
    spaced = inner ** (1 / rho) if rho else np.log(inner)
    np.testing.assert_allclose(np.diff(spaced, 2), 0.0, atol=1e-10)
    assert np.all(np.diff(spaced) < 0)


def test_ends_of_spacings():
    assert ratios(SCHEDULES["ve"].levels(5, "logsnr"))[[0, 4]] == pytest.approx([30.0, 0.02], rel=1e-12)
    # the flow's ratio is infinite at t = 1 and 0 at t = 0: both are cut at 1e-3
    flow = [level.t for level in SCHEDULES["flow"].levels(5, "logsnr")]
    assert flow == pytest.approx([1.0, 0.999, flow[2], flow[3], 0.001, 0.0], rel=1e-12)


@every_table
@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
def test_table_spacings_take_the_nearest_entries(schedule, spacing):
    """Each level is the entry nearest in index to the wanted ratio, if that gives distinct entries."""
    index = np.arange(schedule.t_max + 1)
    with np.errstate(divide="ignore"):
        table = schedule.sigma(index) / schedule.alpha(index)
    finite = index[np.isfinite(table)]
    warp = (lambda r: r ** (1 / 7)) if spacing == "karras" else np.log
    unwarp = (lambda u: u**7) if spacing == "karras" else np.exp
    infinite = index[finite.size :].tolist()
    compared = 0
    for steps in (3, 4, 5, 6, 7):
        wanted = unwarp(np.linspace(warp(table[finite[-1]]), warp(table[0]), steps - len(infinite)))
        places = np.round(np.interp(np.log(wanted), np.log(table[finite]), finite))
        if len(set(places)) == len(places):
            times = [level.t for level in schedule.levels(steps, spacing)]
            assert times == [*infinite, *places, -1]
            compared += 1
    assert compared >= 2


def test_uniform_spacings():
    assert [level.t for level in SCHEDULES["vp_linear"].levels(4)] == [999, 666, 333, 0, -1]
    assert [level.t for level in SCHEDULES["flow"].levels(4)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [level.t for level in schedules.ve(1.0, 4.0).levels(4, "uniform")] == [4.0, 3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "name, spacing",
    [("vp_cosine", "uniform"), ("ve", "logsnr"), ("edm", "karras"), ("flow", "uniform")],
)
def test_default_spacings(name, spacing):
    assert SCHEDULES[name].levels(9) == SCHEDULES[name].levels(9, spacing)


@every_table
@every_spacing
def test_a_table_gives_distinct_entries_up_to_all_of_them(schedule, spacing):
    size = schedule.t_max + 1
    for steps in (size // 2, size - 1, size):
        times = [level.t for level in schedule.levels(steps, spacing)]
        assert len(set(times)) == steps + 1
        assert min(times[:-1]) >= 0
    assert times == [*range(size - 1, -1, -1), -1]
    with pytest.raises(ValueError, match=f"steps: expected at most {size}.*got {size + 1}"):
        schedule.levels(size + 1, spacing)


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 40),
    share=st.floats(0, 1),
    spacing=st.sampled_from(SPACINGS),
    terminal=st.booleans(),
    power=st.floats(0.2, 8),
)
def test_any_table_any_steps(size, share, spacing, terminal, power):
    table = np.linspace(0.9999, 0.0 if terminal else 1e-4, size + 1)[1:] ** power if terminal else (
        np.linspace(0.9999, 1e-4, size) ** power
    )  # fmt: skip
    schedule = schedules.from_alphas_cumprod(table)
    steps = 1 + int(share * (size - 1))
    times = np.array([level.t for level in schedule.levels(steps, spacing)])
    assert times[0] == size - 1 and times[-1] == -1 and len(times) == steps + 1
    assert np.all(np.diff(times) < 0) and times[-2] >= 0


@every_spacing
def test_zero_terminal_snr(spacing):
    schedule = SCHEDULES["zero terminal SNR"]
    levels = schedule.levels(8, spacing)
    assert levels[0] == (19, 0.0, 1.0)
    assert all(level.alpha > 0 for level in levels[1:])
    assert schedule.levels(1, spacing) == ((19, 0.0, 1.0), (-1, 1.0, 0.0))
    alone = schedules.from_alphas_cumprod([0.0])
    assert alone.levels(1, spacing) == ((0, 0.0, 1.0), (-1, 1.0, 0.0))
    with pytest.raises(ValueError, match="steps: expected at most 1"):
        alone.levels(2, spacing)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("with_clean", [False, True])
def test_custom_times(kind, with_clean):
    end = [-1] if with_clean else []
    assert [level.t for level in SCHEDULES["vp_linear"].levels(kind([900, 17, 3, *end]))] == [900, 17, 3, -1]
    end = [0.0] if with_clean else []
    for name in ("flow", "ve"):
        levels = SCHEDULES[name].levels(kind([0.75, 0.5, *end]))
        assert [level.t for level in levels] == [0.75, 0.5, 0.0]
        assert levels[0] == (0.75, SCHEDULES[name].alpha(0.75), 0.75)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s["vp_linear"].levels(0), "steps: expected an integer >= 1.*got 0"),
        (lambda s: s["vp_linear"].levels(True), "steps: .*got True"),
        (lambda s: s["flow"].levels(True), "steps: .*got True"),
        (lambda s: s["flow"].levels(2.5), "steps: .*got 2.5"),
        (lambda s: s["flow"].levels("ten"), "steps: .*got 'ten'"),
        (lambda s: s["edm"].levels(-3), "steps: .*got -3"),
        (lambda s: s["edm"].levels(10, "cosine"), "spacing: expected one of .*'karras'.*got 'cosine'"),
        (lambda s: s["flow"].levels(10, "cosine"), "spacing: .*got 'cosine'"),
        (lambda s: s["edm"].levels([3.0, 1.0], "karras"), "spacing: expected None.*got 'karras'"),
        (lambda s: s["edm"].levels([]), "steps: .*strictly decreasing"),
        (lambda s: s["edm"].levels([0.0]), "steps: .*strictly decreasing"),
        (lambda s: s["edm"].levels([1.0, 3.0]), "steps: .*strictly decreasing"),
        (lambda s: s["edm"].levels([3.0, 3.0]), "steps: .*strictly decreasing"),
        (lambda s: s["edm"].levels([[3.0, 1.0]]), "steps: .*strictly decreasing"),
        (lambda s: s["edm"].levels([100.0, 1.0]), r"t: expected times in \[0, 80\].*got 100"),
        (lambda s: s["edm"].levels([float("nan")]), "t: expected a finite number, got .*nan"),
        (lambda s: s["flow"].levels([1.5, 0.5]), r"t: expected times in \[0, 1\] of flow\(\), got 1.5"),
        (lambda s: s["vp_linear"].levels([1000, 3]), r"t: expected times in \[-1, 999\].*got 1000"),
        (lambda s: s["vp_linear"].levels([10.5, 10.2]), "t: expected step indices of vp_linear.*got 10.5"),
        (lambda s: s["vp_linear"].level(-0.5), "t: expected step indices"),
        (lambda s: s["vp_linear"].alpha(np.array([1.0, 2.5])), "t: expected step indices"),
        (lambda s: s["vp_linear"].sigma(-2), "t: expected times"),
        (lambda s: s["ve"].sigma(torch.tensor([1.0, -1.0])), "t: expected times"),
        (lambda _: schedules.vp_linear(0), "steps: expected an integer >= 1, got 0"),
        (lambda _: schedules.vp_cosine(True), "steps: .*got True"),
        (lambda _: schedules.vp_cosine(10.0), "steps: .*got 10.0"),
        (lambda _: schedules.vp_linear(10, beta_end=1.5), r"beta_end: expected a number in \(0, 1\), got 1.5"),
        (lambda _: schedules.vp_scaled_linear(10, beta_start=-1.0), "beta_start: .*got -1.0"),
        (lambda _: schedules.vp_cosine(10, offset=-0.5), "offset: expected a finite number >= 0, got -0.5"),
        (lambda _: schedules.vp_cosine(10, beta_max=1.0), "beta_max: .*got 1.0"),
        (lambda _: schedules.ve(1.0, 0.5), "sigma_min, sigma_max: expected 0 < min < max, got 1.0, 0.5"),
        (lambda _: schedules.edm(0.0, 1.0), "sigma_min: expected a finite number > 0, got 0.0"),
        (lambda _: schedules.edm(1.0, math.inf), "sigma_max: .*got inf"),
        (lambda _: schedules.from_alphas_cumprod([]), r"table: expected alphas_cumprod of shape \[n\]"),
        (lambda _: schedules.from_alphas_cumprod([[0.5]]), r"table: .*got shape \[1, 1\]"),
        (lambda _: schedules.from_alphas_cumprod([0.5, 0.5]), "table: .*strictly decrease"),
        (lambda _: schedules.from_alphas_cumprod([1.0, 0.5]), r"table: expected alphas_cumprod in \[0, 1\)"),
        (lambda _: schedules.from_alphas_cumprod([0.5, -0.1]), "table: "),
        (lambda _: schedules.from_alphas_cumprod([0.5, math.nan]), "table: "),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(SCHEDULES)
