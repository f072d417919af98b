// The CPU kernels. Each source in kernels/ is compiled once for each instruction set, into a namespace of that
// name; `kernels()` is the table of the best one that this processor has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"
#include "../common/particles.h"
#include "../common/philox.h"
#include "../common/step.h"
#include "../common/weights.h"

namespace fastguide::cpu {

// A contiguous tensor that a kernel reads.
struct Input {
    const void* data;
    Dtype dtype;
};

// One call of reverse_step, all tensors [particles, elements]. The arithmetic is in float, or in double where x is.
struct Step {
    Input x, output, displacement;  // displacement.data may be null
    void *x_s, *x0;                 // in x's dtype; x0 may be null
    const double* levels;           // five numbers, or for each of the five a column [particles]
    bool per_particle;
    Prediction prediction;
    Clip clip;
    bool clip_noise;  // whether the noise, too, is that of the clipped x0
    RandnShape shape;
    int threads;
};

// [particles], in double or float.
struct Weights {
    const void* before;
    void* after;
    bool doubles;
};

// The place of the first ancestor out of range, or -1, and the memory that the call took for itself.
struct Gathered {
    int64_t bad;
    uint64_t scratch;
};

enum class Family : int { gaussian = 0, student_t = 1, laplace = 2, poisson = 3 };

// log p(y | z) of each measurement; of Poisson the scale is the gain. `constant` is the part of it that depends on
// neither z, y nor variances that are added.
struct LogDensity {
    Family family;
    double scale, df, background, constant;
};

// z[samples, elements] of any type, and a gradient like it unless null; y[y_rows, elements], of which sample i has
// row rows[i], or where `rows` is null row i or the only one; variances added[added_rows, elements] with a row for
// each sample or one for all, null if there are none. y and added are float64 where z is, else float32.
struct DensityArrays {
    const void* z;
    const void* y;
    const int64_t* rows;
    const void* added;
    double* log_prob;
    void* gradient;
    Dtype dtype;
    uint64_t samples, elements, y_rows, added_rows;
};

// Log-weights are float32 or float64.
struct Resampling : fastguide::Resampling {
    Input log_weights;
    int threads;
};

// What positions[number] hold of uniforms: one for all strata, one for each, or logarithms of number + 1.
enum class Draws : int { one = 0, strata = 1, spacings = 2 };

// Ancestors[number] of weights[particles] divided by `scale`. The positions are overwritten.
struct Inversion {
    const double* weights;
    uint64_t particles;
    double scale;
    Draws draws;
    double* positions;
    uint64_t number;
    int64_t* ancestors;
    int threads;
};

// `number` ancestors of weights[particles], each as often as its share says.
struct Shares {
    const double* weights;
    uint64_t particles;
    int64_t number;
    int64_t* ancestors;
    int threads;
};

// w[count] = exp(log_weight - the largest), divided by its sum to `out` unless that is null. `sums`: the largest
// log-weight, the sum of w, and that of its squares, or of its products with `weights` unless that is null.
struct Exponentials {
    const double *log_weights, *weights;
    double* out;
    uint64_t count;
    double sums[3];
    int threads;
};

// Fills out[particles, elements] with standard normals on at most `threads` threads.
using Randn = void(void* out, Dtype dtype, const RandnShape& shape, int threads);
// The normals of `pairs` pairs of words (radius, angle), as randn computes them in float32.
using Normals = void(const uint32_t* words, float* out, std::size_t pairs);
using ReverseStep = void(const Step& step);
// The step from x0_hat = step.output, and each particle's log-weight with the log-density ratio added.
using ProposeAndWeigh = void(const Step& step, const Weights& weights);
// Returns the first row without a usable weight, or -1.
using Resample = int64_t(const Resampling& call);
// Moves the particles of each of `count` states to where ancestors[rows, particles] say, int64 if `wide`, else
// int32; none if an ancestor is out of range.
using GatherParticles = Gathered(const void* ancestors, bool wide, uint64_t rows, uint64_t particles,
                                 const ParticleArray* states, std::size_t count, int threads);
// The log-density of each sample and its gradient in z. Returns the place of the first row out of range, and
// then writes nothing, or -1.
using LogProbAndGradient = int64_t(const LogDensity& density, const DensityArrays& arrays, int threads);
// ln x, ln(1 + x) and ln Gamma(x), as log_prob_and_gradient computes them.
using LogFunctions = void(const double* x, double* log, double* log1p, double* log_gamma, std::size_t count);
// Uniforms in [0, 1) as numpy makes them of the words of MT19937, whose key[624] and position move on.
using MersenneDoubles = void(uint32_t* key, int32_t* position, double* out, uint64_t count);
using Invert = void(const Inversion& call);
// floor(number W[k]) copies of each k, and rest[particles] of the shares. Returns how many copies, or -1 if a share is
// out of range or they are more than `number`.
using WholeCopies = int64_t(const Shares& call, double* rest);
// Srinivasan's sampling process with uniforms[particles - 1]. Returns whether the copies were `number`.
using RoundInPairs = bool(const Shares& call, const double* uniforms);
// Each k, or where it is killed the next of drawn[the number of those + 1].
using ReplaceKilled = void(const bool* killed, const int64_t* drawn, int64_t* ancestors, uint64_t particles);
using Exponentiate = void(Exponentials& call);

struct Kernels {
    const char* name;
    Randn* randn;
    Normals* normals;
    ReverseStep* reverse_step;
    ProposeAndWeigh* propose_and_weigh;
    Resample* resample;
    GatherParticles* gather_particles;
    LogProbAndGradient* log_prob_and_gradient;
    LogFunctions* log_functions;
    MersenneDoubles* mersenne_doubles;
    Invert* invert;
    WholeCopies* whole_copies;
    RoundInPairs* round_in_pairs;
    ReplaceKilled* replace_killed;
    Exponentiate* exponentiate;
};

#define FG_DECLARE_KERNELS(isa)                                                                                   \
    namespace isa {                                                                                               \
    Randn randn;                                                                                                  \
    Normals normals;                                                                                              \
    ReverseStep reverse_step;                                                                                     \
    ProposeAndWeigh propose_and_weigh;                                                                            \
    Resample resample;                                                                                            \
    GatherParticles gather_particles;                                                                             \
    LogProbAndGradient log_prob_and_gradient;                                                                     \
    LogFunctions log_functions;                                                                                   \
    MersenneDoubles mersenne_doubles;                                                                             \
    Invert invert;                                                                                                \
    WholeCopies whole_copies;                                                                                     \
    RoundInPairs round_in_pairs;                                                                                  \
    ReplaceKilled replace_killed;                                                                                 \
    Exponentiate exponentiate;                                                                                    \
    constexpr Kernels kKernels{#isa, randn, normals, reverse_step, propose_and_weigh, resample, gather_particles, \
                               log_prob_and_gradient, log_functions, mersenne_doubles, invert, whole_copies,      \
                               round_in_pairs, replace_killed, exponentiate};                                     \
    }

#if defined(__x86_64__)
FG_DECLARE_KERNELS(avx512)
FG_DECLARE_KERNELS(avx2)
#endif
FG_DECLARE_KERNELS(portable)
#undef FG_DECLARE_KERNELS

const Kernels& kernels();

// The instruction sets that this processor has, the best first; and the use of another than the best, for tests
// and benchmarks.
const Kernels* const* available(int* count);
void use(const Kernels& kernels);

}  // namespace fastguide::cpu
