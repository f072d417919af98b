// Memory that a large result is about to be written to.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastguide::cpu {

// Fresh memory costs a fault for each of its pages when it is first written, together several times what the kernel
// that writes it takes: ask for large pages. A wish: where the system has none, nothing changes.
inline void large_pages(const void* data, uint64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kLarge = uintptr_t{2} << 20;
    const uintptr_t at = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (at + kLarge - 1) / kLarge * kLarge, last = (at + bytes) / kLarge * kLarge;
    if (bytes >= 4 * kLarge && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace fastguide::cpu
