// Resampling with the same bits as `particles` (Chopin and Papaspiliopoulos 2020): prefix sums of float64 weights, in
// their order, compared with positions in float64. The sums of weights and of positions run on two threads. The rest is
// divided among all threads.
#include "../../common/binding.h"
#include "../../cpu/memory.h"
#include "../../cpu/scratch.h"
#include "../../cpu/tiles.h"

namespace fastguide::cpu {
namespace {

// What `positions` holds: one uniform for all strata, one uniform for each, or the logarithms of number + 1 uniforms.
enum class Draws : int { one = 0, strata = 1, spacings = 2 };

// A call that finds ancestors[number] from weights[particles] / scale. The positions are overwritten.
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

// A call that gives each particle its share of `number` ancestors.
struct Shares {
    const double* weights;
    uint64_t particles;
    int64_t number;
    int64_t* ancestors;
    int threads;
};

constexpr uint64_t kBlock = 1024, kGrain = 16 * kBlock;
constexpr uint64_t kPiece = 16 * kBlock;  // steps of a merge that are worth a thread
constexpr uint64_t kShort = 64 * kBlock;  // shorter calls are not worth a second thread

// sums[k] = W[0] / scale + ... + W[k] / scale, or an earlier sum that is larger, and NaN from the first NaN on. The sum of
// the last particle whose weight is not 0 becomes infinity. Returns that particle's place.
uint64_t sum_weights(const Inversion& call, double* sums) {
    double total = 0.0, largest = -__builtin_inf();
    for (uint64_t begin = 0; begin < call.particles; begin += kBlock) {
        const uint64_t end = begin + kBlock < call.particles ? begin + kBlock : call.particles;
        const double* terms = call.weights;
        if (call.scale != 1.0) {
            for (uint64_t k = begin; k < end; ++k) sums[k] = call.weights[k] / call.scale;
            terms = sums;
        }
        for (uint64_t k = begin; k < end; ++k) {
            total += terms[k];
            largest = largest > total ? largest : total;
            sums[k] = largest;
        }
    }
    uint64_t last = call.particles - 1;
    while (last > 0 && call.weights[last] == 0.0) --last;
    sums[last] = __builtin_inf();
    return last;
}

// Turns uniforms into positions in their strata, or logarithms of uniforms into arrival times, in place.
void place(const Inversion& call) {
    double* at = call.positions;
    const double number = static_cast<double>(call.number), first = at[0];
    switch (call.draws) {
        case Draws::one:
            for (uint64_t n = 0; n < call.number; ++n) at[n] = (first + static_cast<double>(n)) / number;
            return;
        case Draws::strata:
            for (uint64_t n = 0; n < call.number; ++n) at[n] = (at[n] + static_cast<double>(n)) / number;
            return;
        case Draws::spacings:
            double total = 0.0;
            for (uint64_t n = 0; n <= call.number; ++n) at[n] = total -= at[n];
    }
}

// Merges the positions and the sums, which both ascend. Position n belongs to the first k with !(positions[n] > sums[k]).
// A step takes the next position or the next sum. Before step i, n + k = i.
struct Merge {
    const double *positions, *sums;
    int64_t* ancestors;
    uint64_t number, last;  // the k that the last position belongs to

    FG_INLINE bool passes(uint64_t n, uint64_t k) const { return positions[n] > sums[k]; }
    uint64_t steps() const { return number + last; }

    // The first k in [low, high] that is not passed. `high` must not be passed.
    template <class F>
    static FG_INLINE uint64_t first_not_passed(uint64_t low, uint64_t high, const F& passed) {
        while (low < high) {
            const uint64_t k = low + (high - low) / 2;
            if (passed(k)) low = k + 1;
            else high = k;
        }
        return low;
    }
    uint64_t owner(uint64_t n) const {
        return first_not_passed(0, last, [&](uint64_t k) { return passes(n, k); });
    }
    // The k before step i.
    uint64_t particle_before(uint64_t i) const {
        return first_not_passed(i > number ? i - number : 0, i < last ? i : last,
                                [&](uint64_t k) { return passes(i - k - 1, k); });
    }

    // Bit i says whether position i of four is above the sum. Positions ascend, so all bits after a set bit are set.
    static FG_INLINE uint32_t beyond(const double* four, double sum) {
#if defined(__AVX2__)
        const __m256d above = _mm256_cmp_pd(_mm256_loadu_pd(four), _mm256_set1_pd(sum), _CMP_GT_OQ);
        return static_cast<uint32_t>(_mm256_movemask_pd(above));
#else
        uint32_t bits = 0;
        for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(four[i] > sum) << i;
        return bits;
#endif
    }
    // Writes k for four positions. Later steps overwrite those that do not belong to k.
    FG_INLINE void step(uint64_t& n, uint64_t& k) const {
        const uint32_t bits = beyond(positions + n, sums[k]);
        for (int i = 0; i < 4; ++i) ancestors[n + i] = static_cast<int64_t>(k);
        n += static_cast<uint64_t>(__builtin_ctz(bits | 16));
        k += bits != 0;
    }

    // Takes the steps from `begin` to `end`. Each step waits for the one before, so four parts are walked together.
    void walk(uint64_t begin, uint64_t end) const {
        constexpr int kParts = 4;
        uint64_t n[kParts], k[kParts], stop[kParts];
        for (int part = 0; part <= kParts; ++part) {
            const uint64_t i = begin + (end - begin) * static_cast<uint64_t>(part) / kParts;
            const uint64_t before = particle_before(i);
            if (part < kParts) k[part] = before, n[part] = i - before;
            if (part > 0) stop[part - 1] = i - before;
        }
        for (uint64_t rounds = 1; rounds;) {
            rounds = end;
            for (int part = 0; part < kParts; ++part) {
                const uint64_t sure = (stop[part] - n[part]) / 4;
                rounds = sure < rounds ? sure : rounds;
            }
            for (uint64_t round = 0; round < rounds; ++round)
                for (int part = 0; part < kParts; ++part) step(n[part], k[part]);
        }
        for (int part = 0; part < kParts; ++part) {
            while (n[part] + 4 <= stop[part]) step(n[part], k[part]);
            for (; n[part] < stop[part]; ++n[part]) {
                while (passes(n[part], k[part])) ++k[part];
                ancestors[n[part]] = static_cast<int64_t>(k[part]);
            }
        }
    }
};

void invert(const Inversion& call) {
    if (call.number == 0) return;
    const Scratch<double> sums(call.particles);
    large_pages(sums.data, call.particles * sizeof(double));
    uint64_t last = 0;
    const int threads = call.particles + call.number < kShort ? 1 : call.threads;
    share_out(2, 1, threads, [&](uint64_t job) {
        if (job == 0) last = sum_weights(call, sums.data);
        else place(call);
    });
    double* positions = call.positions;
    if (call.draws == Draws::spacings) {
        share_ranges(call.number, kGrain, threads, [&](uint64_t begin, uint64_t end) {
            for (uint64_t n = begin; n < end; ++n) positions[n] /= positions[call.number];
        });
    }
    Merge merge{positions, sums.data, call.ancestors, call.number, last};
    merge.last = merge.owner(call.number - 1);
    const uint64_t pieces = (merge.steps() + kPiece - 1) / kPiece;
    share_out(pieces, 1, threads, [&](uint64_t i) {
        merge.walk(merge.steps() * i / pieces, merge.steps() * (i + 1) / pieces);
    });
}

uint64_t parts_of(uint64_t particles) { return (particles + kGrain - 1) / kGrain; }

// sums[part] = f(begin, end) for each part [begin, end) of the particles.
template <class F>
void sum_parts(uint64_t particles, int threads, int64_t* sums, const F& f) {
    share_out(parts_of(particles), 1, threads, [&](uint64_t part) {
        const uint64_t begin = part * kGrain;
        sums[part] = f(begin, begin + kGrain < particles ? begin + kGrain : particles);
    });
}

// Writes copies[k] times k from ancestors[start] on, for each k.
void repeat(const int64_t* copies, uint64_t begin, uint64_t end, int64_t* ancestors, int64_t start, int64_t limit) {
    for (uint64_t k = begin; k < end; ++k) {
        const int64_t stop = start + copies[k];
        if (start + 4 <= limit) {  // always four: a branch on their number is hard to predict; the next k overwrites
            for (int i = 0; i < 4; ++i) ancestors[start + i] = static_cast<int64_t>(k);
            start += 4;
        }
        for (; start < stop; ++start) ancestors[start] = static_cast<int64_t>(k);
        start = stop;
    }
}

void repeat_all(const int64_t* copies, uint64_t particles, int64_t* ancestors, int threads) {
    const uint64_t parts = parts_of(particles);
    const Scratch<int64_t> ends(parts);
    sum_parts(particles, threads, ends.data, [&](uint64_t begin, uint64_t end) {
        int64_t sum = 0;
        for (uint64_t k = begin; k < end; ++k) sum += copies[k];
        return sum;
    });
    for (uint64_t part = 1; part < parts; ++part) ends.data[part] += ends.data[part - 1];
    share_out(parts, 1, threads, [&](uint64_t part) {
        const uint64_t begin = part * kGrain, end = begin + kGrain < particles ? begin + kGrain : particles;
        repeat(copies, begin, end, ancestors, part ? ends.data[part - 1] : 0, ends.data[part]);
    });
}

// Splits each share number * W[k] into its whole part and the rest (unless null). Returns the sum of the whole parts, or -1
// if a whole part or the sum is outside [0, number].
int64_t split_shares(const Shares& call, int64_t* whole, double* rest) {
    const uint64_t parts = parts_of(call.particles);
    const Scratch<int64_t> sums(parts);
    const double most = static_cast<double>(call.number);
    sum_parts(call.particles, call.threads, sums.data, [&](uint64_t begin, uint64_t end) {
        int64_t sum = 0, bad = 0;
        for (uint64_t k = begin; k < end; ++k) {
            const double share = most * call.weights[k], floor = __builtin_floor(share);
            const bool in_range = floor >= 0.0 && floor <= most;
            bad |= !in_range;
            whole[k] = static_cast<int64_t>(in_range ? floor : 0.0);
            sum += whole[k];
            if (rest) rest[k] = share - floor;
        }
        return bad ? -1 : sum;
    });
    int64_t sum = 0;
    for (uint64_t part = 0; part < parts && sum >= 0; ++part) {
        sum += sums.data[part];
        if (sums.data[part] < 0 || sum > call.number) sum = -1;
    }
    return sum;
}

// One number in a vector. Compilers choose between such values without a branch.
typedef double One __attribute__((vector_size(16)));
typedef int64_t Choice __attribute__((vector_size(16)));

FG_INLINE One one(double x) { return x - One{}; }
FG_INLINE Choice less(One a, One b) {
#if defined(__x86_64__)  // with AVX-512 GCC would compare into a mask register
    return (Choice)_mm_cmplt_pd((__m128d)a, (__m128d)b);
#else
    return a < b;
#endif
}
FG_INLINE Choice choose(Choice which, Choice a, Choice b) { return (which & a) | (~which & b); }
FG_INLINE One choose(Choice which, One a, One b) { return (One)choose(which, (Choice)a, (Choice)b); }

// Makes floor(number W[k]) copies of each k, and the rests of the shares. Returns the number of copies, or -1 if a share
// is out of range or there are more than `number` copies.
int64_t whole_copies(const Shares& call, double* rest) {
    const Scratch<int64_t> copies(call.particles);
    large_pages(copies.data, call.particles * sizeof(int64_t));
    const int64_t sum = split_shares(call, copies.data, rest);
    if (sum >= 0) repeat_all(copies.data, call.particles, call.ancestors, call.threads);
    return sum;
}

// Srinivasan's sampling process with uniforms[particles - 1]. Returns whether there were `number` copies.
//
// It takes the fractions of the shares two at a time. One gives to the other until the giver has none left or the other is
// whole. Which one gives is random, such that the mean of each stays the same. The fraction that remains, x, is then paired
// with the next one, y.
bool round_in_pairs(const Shares& call, const double* uniforms) {
    const Scratch<int64_t> copies(call.particles);
    large_pages(copies.data, call.particles * sizeof(int64_t));
    int64_t sum = split_shares(call, copies.data, nullptr);
    if (sum < 0) return false;
    const auto fraction = [&](uint64_t k) {  // only valid before copies[k] changes
        return one(static_cast<double>(call.number) * call.weights[k] - static_cast<double>(copies.data[k]));
    };
    One x = fraction(0);
    Choice owner{}, first = ~Choice{};  // the particle that has x; whether it is the first of the pair
    for (uint64_t n = 0; n + 1 < call.particles; ++n) {
        const double u = uniforms[n], v = 1.0 - u;
        const One y = fraction(n + 1), to_x = 1.0 - x, to_y = 1.0 - y;
        const Choice y_fits = less(y, to_x), x_fits = less(x, to_y), next = Choice{} + static_cast<int64_t>(n + 1);
        // The gain of the first of the pair minus u times the sum of both gains, as a linear function of x. Each step
        // waits for the x of the step before, so this must be short. If rounding could matter, the quotient decides.
        const One fitting = choose(first, v * y, -u * y) + choose(first, one(-u), one(v)) * x;
        const One full = choose(first, v - u * to_y, v * to_y - u) + choose(first, one(-v), one(u)) * x;
        const One margin = choose(y_fits, fitting, full);
        Choice second = less(One{}, margin);
        if (!(__builtin_fabs(margin[0]) > 4e-15)) {
            const One x_gains = choose(y_fits, y, to_x), y_gains = choose(x_fits, x, to_y), both = x_gains + y_gains;
            second = Choice{} - (both[0] > 0.0 && u < choose(first, x_gains, y_gains)[0] / both[0]);
        }
        const Choice x_grows = first ^ second;
        first = choose(x_grows, y_fits, x_fits);  // whether the giver has none left
        const Choice changes = first ^ x_grows;  // whether the owner of x changes
        copies.data[choose(changes, owner, next)[0]] += 1 + first[0];
        sum += 1 + first[0];
        owner = choose(changes, next, owner);
        x = choose(first, x + y, choose(x_grows, y - to_x, x - to_y));
    }
    if (sum == call.number - 1 && x[0] > 0.99) {  // x would be whole without rounding
        ++copies.data[owner[0]];
        ++sum;
    }
    if (sum == call.number) repeat_all(copies.data, call.particles, call.ancestors, call.threads);
    return sum == call.number;
}

// ancestors[k] is k, or the next of `drawn` if k is killed. `drawn` has one more entry than there are killed particles.
void replace_killed(const bool* killed, const int64_t* drawn, int64_t* ancestors, uint64_t particles) {
    for (uint64_t k = 0, n = 0; k < particles; ++k) {
        const int64_t own = static_cast<int64_t>(k), other = drawn[n];
        ancestors[k] = own ^ ((own ^ other) & -static_cast<int64_t>(killed[k]));
        n += killed[k];
    }
}

// weights, particles, scale, draws, positions, number, ancestors, threads
PyObject* call_invert(Arguments& in) {
    Inversion of{};
    of.weights = in.pointer<const double>("weights"), of.particles = in.integer();
    check_below("particles, less one,", of.particles - 1, kMaxParticles);
    of.scale = in.number(), of.draws = in.code("draws", Draws::spacings);
    of.positions = in.pointer<double>("positions"), of.number = in.integer();
    of.ancestors = in.pointer<int64_t>("ancestors"), of.threads = in.threads();
    without_gil([&] { invert(of); });
    return none();
}

// weights, particles, number, ancestors
Shares read_shares(Arguments& in) {
    Shares of{};
    of.weights = in.pointer<const double>("weights"), of.particles = in.integer();
    check_below("particles, less one,", of.particles - 1, kMaxParticles);
    of.number = static_cast<int64_t>(in.integer()), of.ancestors = in.pointer<int64_t>("ancestors");
    return of;
}

// weights, particles, number, ancestors, rest, threads
PyObject* call_whole_copies(Arguments& in) {
    Shares of = read_shares(in);
    const auto rest = in.pointer<double>("rest");
    of.threads = in.threads();
    return PyLong_FromLongLong(without_gil([&] { return whole_copies(of, rest); }));
}

// weights, particles, number, ancestors, uniforms, threads
PyObject* call_round_in_pairs(Arguments& in) {
    Shares of = read_shares(in);
    const auto uniforms = in.pointer<const double>("uniforms");
    of.threads = in.threads();
    return PyBool_FromLong(without_gil([&] { return round_in_pairs(of, uniforms); }));
}

// killed, drawn, ancestors, particles
PyObject* call_replace_killed(Arguments& in) {
    const auto killed = in.pointer<const bool>("killed");
    const auto drawn = in.pointer<const int64_t>("drawn");
    const auto ancestors = in.pointer<int64_t>("ancestors");
    const uint64_t particles = in.integer();
    without_gil([&] { replace_killed(killed, drawn, ancestors, particles); });
    return none();
}

Binding bindings[] = {
    {"invert", fastcall<call_invert, 8>,
     "Ancestors [number] (int64) of float64 weights [particles] over `scale`. Positions, overwritten, hold one uniform "
     "(draws 0), one for each stratum (1), or logarithms of number + 1 of them (2)."},
    {"whole_copies", fastcall<call_whole_copies, 6>,
     "The whole parts of the shares as ancestors, and what remains of each. Returns how many, or -1."},
    {"round_in_pairs", fastcall<call_round_in_pairs, 6>,
     "Ancestors by Srinivasan's sampling process. Returns whether they were `number`."},
    {"replace_killed", fastcall<call_replace_killed, 4>,
     "Each particle's own index, or where it is killed the next that is drawn."},
};

}  // namespace
}  // namespace fastguide::cpu
