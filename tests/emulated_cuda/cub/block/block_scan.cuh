#pragma once

#include "../collective.h"

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <class T, int kThreads, BlockScanAlgorithm = BLOCK_SCAN_RAKING>
class BlockScan {
public:
    struct TempStorage {
        T values[kThreads];
    };

    explicit BlockScan(TempStorage& storage) : storage_(&storage) {}

    void InclusiveSum(T input, T& output, emulated::Line line = {__builtin_LINE()}) {
        T total;
        sum(&input, &output, 1, true, total, line);
    }
    void InclusiveSum(T input, T& output, T& total, emulated::Line line = {__builtin_LINE()}) {
        sum(&input, &output, 1, true, total, line);
    }
    void ExclusiveSum(T input, T& output, emulated::Line line = {__builtin_LINE()}) {
        T total;
        sum(&input, &output, 1, false, total, line);
    }
    void ExclusiveSum(T input, T& output, T& total, emulated::Line line = {__builtin_LINE()}) {
        sum(&input, &output, 1, false, total, line);
    }
    template <int kItems>
    void InclusiveSum(T (&input)[kItems], T (&output)[kItems], emulated::Line line = {__builtin_LINE()}) {
        T total;
        sum(input, output, kItems, true, total, line);
    }
    template <int kItems>
    void InclusiveSum(T (&input)[kItems], T (&output)[kItems], T& total, emulated::Line line = {__builtin_LINE()}) {
        sum(input, output, kItems, true, total, line);
    }
    template <int kItems>
    void ExclusiveSum(T (&input)[kItems], T (&output)[kItems], emulated::Line line = {__builtin_LINE()}) {
        T total;
        sum(input, output, kItems, false, total, line);
    }
    template <int kItems>
    void ExclusiveSum(T (&input)[kItems], T (&output)[kItems], T& total, emulated::Line line = {__builtin_LINE()}) {
        sum(input, output, kItems, false, total, line);
    }

    template <class Operation>
    void ExclusiveScan(T input, T& output, T first, Operation operation, emulated::Line line = {__builtin_LINE()}) {
        output = scan(input, first, operation, line).own;
    }

private:
    TempStorage* storage_;

    // For each thread, the result over all threads before it; and the result over all threads.
    template <class Operation>
    emulated::Results<T> scan(T input, T first, Operation operation, emulated::Line line) {
        emulated::use_storage(storage_);
        return emulated::collect(input, line, [=](T* values, unsigned threads) {
            T so_far = first;
            for (unsigned i = 0; i < threads; ++i) so_far = operation(so_far, std::exchange(values[i], so_far));
            return so_far;
        });
    }

    void sum(const T* input, T* output, int items, bool inclusive, T& total, emulated::Line line) {
        const auto sums = scan(std::accumulate(input, input + items, T()), T(), std::plus<T>(), line);
        T so_far = sums.own;
        total = sums.all;
        for (int i = 0; i < items; ++i) {
            const T item = input[i];  // output may be input
            output[i] = inclusive ? so_far + item : so_far;
            so_far = so_far + item;
        }
    }
};

}  // namespace cub
