// The Python module FG_MODULE. It has all bindings that are linked with this file.
#include "binding.h"

namespace fastguide {

Binding* Binding::last_ = nullptr;

}  // namespace fastguide

#define FG_JOIN(a, b) a##b
#define FG_INIT(name) FG_JOIN(PyInit_, name)
#define FG_STRING(name) #name
#define FG_NAME(name) FG_STRING(name)

PyMODINIT_FUNC FG_INIT(FG_MODULE)() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, FG_NAME(FG_MODULE), "fastguide's compiled kernels", -1,
                                     nullptr, nullptr, nullptr, nullptr, nullptr};
    PyObject* module = PyModule_Create(&definition);
    if (module && !fastguide::Binding::add_all(module)) Py_CLEAR(module);
    return module;
}
