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

    // Only the first thread gets the result.
    template <class Operation>
    T Reduce(T input, Operation operation, emulated::Line line = {__builtin_LINE()}) {
        emulated::use_storage(storage_);
        const T result = emulated::collect(input, line, [=](const T* values, unsigned threads) {
            return std::accumulate(values + 1, values + threads, values[0], operation);
        }).all;
        return threadIdx.x == 0 ? result : emulated::garbage<T>();
    }
    T Sum(T input, emulated::Line line = {__builtin_LINE()}) {
        return Reduce(input, std::plus<T>(), line);
    }

private:
    TempStorage* storage_;
};

}  // namespace cub
