// Arguments of functions that Python calls without pybind11's signatures: of a small step's few microseconds those
// would take a tenth. Positional, with one caller, fastguide/compiled.py. What is out of range or of another kind is an
// error here too, since the caller leaves the numbers to it.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

#include "common/arguments.h"
#include "cpu/kernels.h"

namespace fastguide {

class Arguments {
public:
    Arguments(PyObject* const* values, Py_ssize_t given, Py_ssize_t expected) : next_(values) {
        if (given != expected)
            throw pybind11::type_error("expected " + std::to_string(expected) + " arguments, got " +
                                       std::to_string(given));
    }

    uint64_t integer() { return integer(*next_++); }
    bool flag() {
        PyObject* value = *next_++;
        if (value != Py_True && value != Py_False) throw pybind11::type_error("expected a bool");
        return value == Py_True;
    }
    double number() { return number(*next_++); }
    // `expect_memory` says whether it may be null.
    void* pointer(const char* name) {
        void* data = reinterpret_cast<void*>(static_cast<uintptr_t>(integer()));
        if (!data) null_ = name;
        return data;
    }
    // Null for Python's None.
    void* pointer_or_none(const char* name) {
        if (*next_ != Py_None) return pointer(name);
        ++next_;
        return nullptr;
    }
    Dtype dtype() { return code("dtype", Dtype::float64); }
    Scheme scheme() { return code("scheme", Scheme::residual); }
    Prediction prediction() { return code("prediction", Prediction::flow); }
    Clip clip() {
        const ClipKind kind = code("clip", ClipKind::dynamic);
        const double low = number();
        return {kind, low, number()};
    }
    cpu::Input input(const char* name) {
        const void* data = pointer_or_none(name);
        return {data, dtype()};
    }
    // The shape of a state, [N, *event], and a counter.
    RandnShape shape() {
        PyObject* sizes = *next_++;
        if (!PyTuple_Check(sizes) || PyTuple_GET_SIZE(sizes) == 0) throw pybind11::type_error("expected [N, *event]");
        const uint64_t particles = integer(PyTuple_GET_ITEM(sizes, 0));
        uint64_t elements = 1;
        for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(sizes); ++i) {
            const uint64_t size = integer(PyTuple_GET_ITEM(sizes, i));
            check_below("elements", size, kMaxElements / (elements ? elements : 1) + 1);
            elements *= size;
        }
        expect_memory(particles * (elements > 0));
        const uint64_t seed = integer(), step = integer(), stream = integer(), first_particle = integer();
        return checked_shape(particles, elements, seed, step, stream, first_particle);
    }
    // Of the pointers so far.
    void expect_memory(uint64_t elements) {
        if (null_) fastguide::expect_memory(null_, nullptr, elements);
        null_ = nullptr;
    }

    // A tuple of five floats, kept in `five`, or the address of five columns.
    void levels(cpu::Step& step, double (&five)[5]) {
        step.per_particle = !PyTuple_Check(*next_);
        if (step.per_particle) {
            step.levels = static_cast<const double*>(pointer("levels"));
            return;
        }
        PyObject* tuple = *next_++;
        if (PyTuple_GET_SIZE(tuple) != 5) throw pybind11::value_error("levels: expected five");
        for (Py_ssize_t i = 0; i < 5; ++i) {
            five[i] = number(PyTuple_GET_ITEM(tuple, i));
            if (!(five[i] >= 0.0 && std::isfinite(five[i]))) throw pybind11::value_error("levels: expected finite");
        }
        const bool divides = step.prediction == Prediction::epsilon || step.prediction == Prediction::score;
        if (five[1] == 0.0 || five[4] > five[3] * (1 + 1e-6) || (divides && five[0] == 0.0))
            throw pybind11::value_error("levels: expected sigma_t > 0, tau <= sigma_s, and alpha_t > 0 to divide by");
        step.levels = five;
    }

private:
    static uint64_t integer(PyObject* value) {
        if (!PyLong_CheckExact(value)) throw pybind11::type_error("expected an integer");
        const unsigned long long got = PyLong_AsUnsignedLongLong(value);
        if (got == ~0ull && PyErr_Occurred()) throw pybind11::error_already_set();
        return got;
    }
    static double number(PyObject* value) {
        if (!PyFloat_Check(value)) throw pybind11::type_error("expected a float");
        return PyFloat_AS_DOUBLE(value);
    }
    template <class Enum>
    Enum code(const char* name, Enum last) {
        const uint64_t value = integer();
        check_below(name, value, static_cast<uint64_t>(last) + 1);
        return static_cast<Enum>(value);
    }

    PyObject* const* next_;
    const char* null_ = nullptr;  // the last pointer that is null
};

// What f returns, or its exception as Python's.
template <class F>
PyObject* object_or_error(const F& f) {
    try {
        return f();
    } catch (pybind11::error_already_set& error) {
        error.restore();
    } catch (const pybind11::builtin_exception& error) {
        error.set_error();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    }
    return nullptr;
}

template <class F>
PyObject* none_or_error(const F& f) {
    return object_or_error([&] {
        f();
        Py_RETURN_NONE;
    });
}

}  // namespace fastguide
