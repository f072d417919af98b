#pragma once

#include "../collective.h"

namespace cub {

template <class T, int kThreads>
class BlockReduce {
public:
    struct TempStorage {
        T values[kThreads];
    };

    explicit BlockReduce(TempStorage& storage) : storage_(&storage) {}

    // The first thread's result; the others get none.
    template <class Operation>
    T Reduce(T input, Operation operation, emulated::Line line = {__builtin_LINE()}) {
        emulated::use_storage(storage_);
        const std::vector<T> all = emulated::exchange(input, line);
        if (threadIdx.x != 0) return emulated::garbage<T>();
        return std::accumulate(all.begin() + 1, all.end(), all[0], operation);
    }
    T Sum(T input, emulated::Line line = {__builtin_LINE()}) {
        return Reduce(input, std::plus<T>(), line);
    }

private:
    TempStorage* storage_;
};

}  // namespace cub
