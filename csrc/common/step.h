// The multipliers of the reverse step x_s = a x + b clip(x0_hat) + c x0_hat + displacement + tau z with
// x0_hat = p x + q output.
#pragma once

#include <cmath>

#include "config.h"

namespace fastguide {

// The codes that Python passes, in the order of fastguide.reference.PREDICTIONS.
enum class Prediction : int { epsilon = 0, sample = 1, score = 2, v = 3, flow = 4 };

struct Coefficients {
    double alpha_t, sigma_t, alpha_s, sigma_s, tau;
};

struct Multipliers {
    double p, q, a, b, tau, c;
};

// x0_hat = p x + q output. The same operations as in fastguide.ops.predict_x0.reference.x0_coefficients.
struct X0Multipliers {
    double p, q;
};

FG_HD X0Multipliers x0_multipliers(double alpha, double sigma, Prediction prediction) {
    switch (prediction) {
        case Prediction::sample: break;
        case Prediction::epsilon: return {1.0 / alpha, -sigma / alpha};
        case Prediction::score: return {1.0 / alpha, sigma * sigma / alpha};
        case Prediction::v: return {alpha / (alpha * alpha + sigma * sigma), -sigma / (alpha * alpha + sigma * sigma)};
        case Prediction::flow: return {1.0 / (alpha + sigma), -sigma / (alpha + sigma)};
    }
    return {0.0, 1.0};
}

// The same operations as in fastguide.ops.reverse_step.reference.multipliers.
FG_HD Multipliers multipliers(const Coefficients& l, Prediction prediction, bool clip_noise) {
    const double square = l.sigma_s * l.sigma_s - l.tau * l.tau;
    const double a = std::sqrt(square < 0.0 ? 0.0 : square) / l.sigma_t;
    const double share = l.alpha_t * a;  // how much of x0_hat the predicted noise contains
    const auto [p, q] = x0_multipliers(l.alpha_t, l.sigma_t, prediction);
    return {p, q, a, clip_noise ? l.alpha_s - share : l.alpha_s, l.tau, clip_noise ? 0.0 : -share};
}

// none: no clipping. range: clip to [low, high]. dynamic: the bound is the `low` quantile of the particle's |x0|, kept
// within [1, high]; clip to [-bound, bound] and divide by the bound.
enum class ClipKind : int { none = 0, range = 1, dynamic = 2 };

struct Clip {
    ClipKind kind;
    double low, high;
};

}  // namespace fastguide
