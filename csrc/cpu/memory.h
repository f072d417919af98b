// Large pages for large results.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastguide::cpu {

// The first write to each page of new memory costs a page fault. Together these take several times as long as the
// kernel that writes the memory, so ask for large pages. This is only a hint: without large pages nothing changes.
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
