// Memory of a kernel's own. Allocate before anything is written and outside of parallel regions: it may throw.
//
// Buffers live here and not on the stack: a thread's stack may be 64 kB, and its callers' frames need most of that.
#pragma once

#include <new>

#include "simd.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastguide::cpu {

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

// What is left of one thread's part of a workspace. Passed by value: what a function takes is free when it returns.
// Begun at zero it counts how much will be taken.
struct Memory {
    static constexpr uint64_t kLine = 64;
    uintptr_t next = 0;

    // A line stays free after each buffer: those of a power of two would meet in the cache, and the address sanitizer
    // sees what writes past an end.
    template <class T>
    T* take(uint64_t count) {
        T* const at = reinterpret_cast<T*>(next);
        const uint64_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine + kLine;
#if defined(__SANITIZE_ADDRESS__)
        if (next) __asan_poison_memory_region(at, bytes), __asan_unpoison_memory_region(at, count * sizeof(T));
#endif
        next += bytes;
        return at;
    }
};

// The memory of each of `members` threads that share the work.
class Workspace {
public:
    Workspace(const Memory& counted, int members) : each_(counted.next) {
        if (each_ == 0) return;
        memory_.allocate(each_ * static_cast<uint64_t>(members) + Memory::kLine);
        first_ = (reinterpret_cast<uintptr_t>(memory_.data) + Memory::kLine - 1) / Memory::kLine * Memory::kLine;
    }
    // Of one member: what another workspace gave it.
    explicit Workspace(const Memory& given) : each_(0), first_(given.next) {}

    Memory of(int member) const { return {first_ + each_ * static_cast<uint64_t>(member)}; }

private:
    uint64_t each_;
    uintptr_t first_ = 0;
    Scratch<char> memory_;
};

}  // namespace fastguide::cpu
