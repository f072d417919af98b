// Memory of a kernel's own. Allocate before anything is written and outside of parallel regions: it may throw.
#pragma once

#include <new>

#include "simd.h"

namespace fastguide::cpu::FG_ISA {

template <class T>
struct Scratch {
    T* data = nullptr;

    Scratch() = default;
    explicit Scratch(uint64_t count) { allocate(count); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { ::operator delete(data); }

    // Returns the number of bytes.
    uint64_t allocate(uint64_t count) {
        data = static_cast<T*>(::operator new(count * sizeof(T)));
        return count * sizeof(T);
    }
};

}  // namespace fastguide::cpu::FG_ISA
