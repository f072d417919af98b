// The reverse step x_s = a x + b clip(x0_hat) + c x0_hat + displacement + tau z, x0_hat = p x + q output, by its levels.
#pragma once

#include <cmath>

#include "config.h"

namespace fastguide {

// By the code that Python passes: the order of fastguide.reference.PREDICTIONS.
enum class Prediction : int { epsilon = 0, sample = 1, score = 2, v = 3, flow = 4 };

struct Levels {
    double alpha_t, sigma_t, alpha_s, sigma_s, tau;
};

struct Multipliers {
    double p, q, a, b, tau, c;
};

// fastguide.reference._multipliers, operation by operation.
FG_HD Multipliers multipliers(const Levels& l, Prediction prediction, bool clip_noise) {
    const double square = l.sigma_s * l.sigma_s - l.tau * l.tau;
    const double a = std::sqrt(square < 0.0 ? 0.0 : square) / l.sigma_t;
    const double share = l.alpha_t * a;  // of x0_hat in the noise
    const double alpha = l.alpha_t, sigma = l.sigma_t;
    double p = 0.0, q = 1.0;
    switch (prediction) {
        case Prediction::sample: break;
        case Prediction::epsilon: p = 1.0 / alpha, q = -sigma / alpha; break;
        case Prediction::score: p = 1.0 / alpha, q = sigma * sigma / alpha; break;
        case Prediction::v: p = alpha / (alpha * alpha + sigma * sigma), q = -sigma / (alpha * alpha + sigma * sigma); break;
        case Prediction::flow: p = 1.0 / (alpha + sigma), q = -sigma / (alpha + sigma); break;
    }
    return {p, q, a, clip_noise ? l.alpha_s - share : l.alpha_s, l.tau, clip_noise ? 0.0 : -share};
}

// none; range: to [low, high]; dynamic: to the `low` quantile of each particle's |x0|, held in [1, high], and
// divided by it.
enum class ClipKind : int { none = 0, range = 1, dynamic = 2 };

struct Clip {
    ClipKind kind;
    double low, high;
};

}  // namespace fastguide
