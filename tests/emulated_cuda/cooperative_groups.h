#pragma once

#include "cuda_runtime_api.h"

namespace cooperative_groups {

struct grid_group {
    void sync(emulated::Line line = {__builtin_LINE()}) const {
        emulated::count_barrier();
        emulated::wait(true, line);
    }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
