// Scratch memory of a kernel. Allocate it before any result is written and outside of parallel regions, because it may
// throw.
//
// Buffers are here and not on the stack: a thread's stack may be 64 kB, and the frames of its callers need most of it.
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

// The free rest of one thread's part of a workspace. Passed by value, so what a function takes is free again when it
// returns. A Memory that starts at address zero only counts how much is taken.
struct Memory {
    static constexpr uint64_t kLine = 64;
    uintptr_t next = 0;

    // A cache line stays free after each buffer. Otherwise buffers whose size is a power of two would share cache sets.
    // It also lets the address sanitizer see writes past the end.
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

// The scratch memory of `members` threads that share the work.
class Workspace {
public:
    Workspace(const Memory& counted, int members) : each_(counted.next) {
        if (each_ == 0) return;
        memory_.allocate(each_ * static_cast<uint64_t>(members) + Memory::kLine);
        first_ = (reinterpret_cast<uintptr_t>(memory_.data) + Memory::kLine - 1) / Memory::kLine * Memory::kLine;
    }
    // A workspace for one thread, inside memory that another workspace gave to it.
    explicit Workspace(const Memory& given) : each_(0), first_(given.next) {}

    Memory of(int member) const { return {first_ + each_ * static_cast<uint64_t>(member)}; }

private:
    uint64_t each_;
    uintptr_t first_ = 0;
    Scratch<char> memory_;
};

}  // namespace fastguide::cpu
