// How Python calls a kernel: by position and without a signature. A signature would cost a small step a tenth of its
// few microseconds. Only fastguide calls these functions. They check types and ranges, because the callers do not.
// Pointers arrive as integers: csrc knows no tensor library.
//
// A binding stands beside its kernel and registers itself:
//
//   PyObject* twice(Arguments& in) { return PyLong_FromUnsignedLongLong(2 * in.integer()); }
//   Binding binding{"twice", fastcall<twice, 1>, "Two times a number."};
//
// The 1 is the number of arguments. The function reads that many, in their order. Read them in declarations or in
// braces: C++ evaluates the arguments of a call in any order.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "dtype.h"

namespace fastguide {

// Thrown when Python's error is already set.
struct ErrorIsSet {};

struct TypeError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

class Arguments {
public:
    Arguments(PyObject* const* values, Py_ssize_t count) : first_(values), next_(values), count_(count) {}

    Py_ssize_t count() const { return count_; }
    void expect(Py_ssize_t count) const {
        if (count_ != count)
            throw TypeError("expected " + std::to_string(count) + " arguments, got " + std::to_string(count_));
    }

    uint64_t integer() {
        PyObject* value = *next_++;
        if (!PyLong_CheckExact(value)) expected("an integer");
        const unsigned long long got = PyLong_AsUnsignedLongLong(value);
        if (got == ~0ull && PyErr_Occurred()) throw ErrorIsSet();
        return got;
    }
    int threads() { return static_cast<int>(integer()); }
    bool flag() {
        PyObject* value = *next_++;
        if (value != Py_True && value != Py_False) expected("a bool");
        return value == Py_True;
    }
    double number() {
        PyObject* value = *next_++;
        if (!PyFloat_Check(value)) expected("a float");
        return PyFloat_AS_DOUBLE(value);
    }
    // Reads the code of a value of an enumeration whose last value is `last`.
    template <class Enum>
    Enum code(const char* name, Enum last) {
        const uint64_t value = integer();
        check_below(name, value, static_cast<uint64_t>(last) + 1);
        return static_cast<Enum>(value);
    }
    Dtype dtype(Dtype last = Dtype::float64) { return code("dtype", last); }

    // May be null here; `expect_memory` checks that later.
    template <class T = void>
    T* pointer(const char* name) {
        T* data = reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
        if (!data) null_ = name;
        return data;
    }
    // The same, but returns null for Python's None.
    template <class T = void>
    T* pointer_or_none(const char* name) {
        if (!is_none()) return pointer<T>(name);
        ++next_;
        return nullptr;
    }
    // Checks the pointers read since the last call of this.
    void expect_memory(uint64_t elements) {
        if (null_) fastguide::expect_memory(null_, nullptr, elements);
        null_ = nullptr;
    }

    bool is_none() const { return *next_ == Py_None; }
    bool is_tuple() const { return PyTuple_Check(*next_); }
    bool is_float() const { return PyFloat_Check(*next_); }
    // The items of a list or a tuple.
    Arguments items() {
        PyObject* value = *next_++;
        if (!PyTuple_Check(value) && !PyList_Check(value)) expected("a list or a tuple");
        return {PySequence_Fast_ITEMS(value), PySequence_Fast_GET_SIZE(value)};
    }

    uint32_t word() {
        const uint64_t value = integer();
        check_below("words", value, uint64_t{1} << 32);
        return static_cast<uint32_t>(value);
    }

    // Reads seed, step, stream and the first particle of a [particles, elements] array.
    RandnShape counter(uint64_t particles, uint64_t elements) {
        const uint64_t seed = integer(), step = integer(), stream = integer(), first_particle = integer();
        return checked_shape(particles, elements, seed, step, stream, first_particle);
    }

private:
    // Says which argument was read last, counted from 1, and what was expected.
    [[noreturn]] void expected(const char* kind) const {
        throw TypeError("argument " + std::to_string(next_ - first_) + ": expected " + kind);
    }

    PyObject* const* first_;
    PyObject* const* next_;
    Py_ssize_t count_;
    const char* null_ = nullptr;  // the last pointer that is null
};

struct PhiloxWords {
    Words4 counter;
    uint32_t key0, key1;
};

// Reads a tuple of four words and a tuple of two words.
inline PhiloxWords read_philox(Arguments& in) {
    Arguments counter = in.items(), key = in.items();
    counter.expect(4), key.expect(2);
    const Words4 four{counter.word(), counter.word(), counter.word(), counter.word()};
    const uint32_t key0 = key.word();
    return {four, key0, key.word()};
}

// Releases Python's lock (the GIL) during its lifetime.
class WithoutGil {
public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;
    ~WithoutGil() { PyEval_RestoreThread(state_); }

private:
    PyThreadState* state_;
};

// Runs f() without Python's lock and returns its result.
template <class F>
auto without_gil(const F& f) {
    const WithoutGil released;
    return f();
}

inline PyObject* none() { return Py_NewRef(Py_None); }

// Wraps `kFunction`, of `kCount` arguments, for Python. C++ exceptions become Python exceptions.
template <PyObject* (*kFunction)(Arguments&), Py_ssize_t kCount>
PyObject* fastcall(PyObject*, PyObject* const* values, Py_ssize_t given) {
    try {
        Arguments in(values, given);
        in.expect(kCount);
        return kFunction(in);
    } catch (const ErrorIsSet&) {
    } catch (const TypeError& error) {
        PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// One function of the module. module.cpp adds all of them.
class Binding {
public:
    Binding(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t), const char* doc)
        : methods_{{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc}, {}},
          next_(last_) {
        last_ = this;
    }
    Binding(const Binding&) = delete;
    Binding& operator=(const Binding&) = delete;

    // Returns whether Python accepted them all.
    static bool add_all(PyObject* module) {
        for (Binding* each = last_; each; each = each->next_)
            if (PyModule_AddFunctions(module, each->methods_) != 0) return false;
        return true;
    }

private:
    static Binding* last_;
    PyMethodDef methods_[2];  // the function, and the empty entry that ends a list
    Binding* next_;
};

}  // namespace fastguide
