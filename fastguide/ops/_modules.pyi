"""The functions of the compiled modules: `Cpu` of fastguide._cpu_avx512, _cpu_avx2 and _cpu_portable, `Cuda` of
fastguide._cuda. `_native.module` returns them.

Arguments go by position. Tensors go as addresses: 0, or None where the type allows it, for one that is not there. Codes
of dtypes are `_native.CPU_DTYPES` and `CUDA_DTYPES`; csrc has the others beside each kernel.
"""

from collections.abc import Sequence
from typing import Protocol

Address = int
Words4 = tuple[int, int, int, int]
Arrays = Sequence[tuple[Address, int]]  # each with the bytes of a particle

class Particles(Protocol):
    """What csrc/integrations/particles adds to a CPU module, for fastguide.integrations.particles alone."""

    def invert(
        self, weights: Address, particles: int, scale: float, draws: int, positions: Address, number: int,
        ancestors: Address, threads: int, /,
    ) -> None: ...  # fmt: skip
    def whole_copies(
        self, weights: Address, particles: int, number: int, ancestors: Address, rest: Address, threads: int, /
    ) -> int: ...
    def round_in_pairs(
        self, weights: Address, particles: int, number: int, ancestors: Address, uniforms: Address, threads: int, /
    ) -> bool: ...
    def replace_killed(self, killed: Address, drawn: Address, ancestors: Address, particles: int, /) -> None: ...
    def exponentiate(
        self, log_weights: Address, count: int, weights: Address, out: Address, threads: int, /
    ) -> tuple[float, float, float]: ...
    def mersenne_doubles(self, key: Address, position: Address, out: Address, count: int, /) -> None: ...

class Cpu(Particles, Protocol):
    def instruction_set(self) -> str: ...
    def instruction_sets(self) -> list[str]: ...
    def philox(self, counter: Sequence[int], key: Sequence[int], /) -> Words4: ...
    def randn(
        self, out: Address, dtype: int, particles: int, elements: int,
        seed: int, step: int, stream: int, first_particle: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    def normals(self, words: Address, out: Address, pairs: int, /) -> None: ...
    def predict_x0(
        self, x: Address | None, x_dtype: int, model_output: Address | None, output_dtype: int,
        unconditional: Address | None, unconditional_dtype: int, x0_hat: Address | None, x0_dtype: int,
        not_finite: Address | None, prediction: int, levels: tuple[float, float] | Address,
        guidance_scale: float | Address, samples: int, elements: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    def predict_x0_backward(
        self, grad: Address, grad_dtype: int, x: Address | None, x_dtype: int,
        model_output: Address | None, output_dtype: int, unconditional: Address | None, unconditional_dtype: int,
        prediction: int, levels: tuple[float, float] | Address, guidance_scale: float | Address,
        samples: int, elements: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    def reverse_step(
        self, x: Address, x_dtype: int, model_output: Address, output_dtype: int,
        displacement: Address | None, displacement_dtype: int, x_s: Address, x0: Address | None, return_x0: bool,
        not_finite: Address | None, prediction: int, unconditional: Address | None, unconditional_dtype: int,
        guidance_scale: float | Address, clip: int, low: float, high: float, clip_noise: bool,
        coefficients: Sequence[float] | Address, displacement_scale: float | Address, shape: tuple[int, ...],
        seed: int, step: int, stream: int, first_particle: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    def propose_and_weigh(
        self, x: Address, x_dtype: int, x0_hat: Address, x0_dtype: int, displacement: Address, displacement_dtype: int,
        x_s: Address, log_weights: Address, log_weights_after: Address, double_weights: bool,
        not_finite: Address | None, clip: int, low: float, high: float,
        coefficients: Sequence[float] | Address, displacement_scale: float | Address, shape: tuple[int, ...],
        seed: int, step: int, stream: int, first_particle: int, threads: int, /,
    ) -> None: ...  # fmt: skip
    def log_prob_and_gradient(
        self, family: int, scale: float, df: float, background: float, constant: float,
        dtype: int, samples: int, elements: int, z: Address, y: Address, y_rows: int, rows: Address | None,
        extra_variance: Address | None, extra_rows: int, log_factorials: Address | None,
        log_prob: Address, gradient: Address | None, threads: int, /,
    ) -> int: ...  # fmt: skip
    def log_functions(self, x: Address, log: Address, log1p: Address, log_gamma: Address, count: int, /) -> None: ...
    def resample(
        self, log_weights: Address | None, dtype: int, rows: int, particles: int, number: int, scheme: int,
        sorted: bool, keep_from: float, seed: int, step: int, stream: int, first_row: int,
        ancestors: Address, log_weights_after: Address, log_mean_weight: Address, ess: Address, threads: int, /,
    ) -> int: ...  # fmt: skip
    def gather_particles(
        self, ancestors: Address, wide: bool, rows: int, particles: int, states: Arrays, threads: int, /
    ) -> tuple[int, int]: ...

class Cuda(Protocol):
    def philox(self, out: Address, counter: Sequence[int], key: Sequence[int], cuda_stream: int, /) -> None: ...
    def randn(
        self, out: Address, dtype: int, particles: int, elements: int,
        seed: int, step: int, stream: int, first_particle: int, seed_at: Address, step_at: Address,
        cuda_stream: int, /,
    ) -> None: ...  # fmt: skip
    def resample_workspace(self, rows: int, particles: int, number: int, scheme: int, sorted: bool, /) -> int: ...
    def resample(
        self, log_weights: Address, doubles: bool, rows: int, particles: int, number: int, scheme: int,
        sorted: bool, keep_from: float, seed: int, step: int, stream: int, first_row: int,
        seed_at: Address, step_at: Address, ancestors: Address, log_weights_after: Address,
        log_mean_weight: Address, ess: Address, workspace: Address, cuda_stream: int, /,
    ) -> None: ...  # fmt: skip
    def gather_workspace(self, rows: int, particles: int, states: Arrays, /) -> int: ...
    def gather_particles(
        self, ancestors: Address, wide: bool, rows: int, particles: int, states: Arrays, flags: Address,
        workspace: Address, workspace_bytes: int, cuda_stream: int, /,
    ) -> None: ...  # fmt: skip
