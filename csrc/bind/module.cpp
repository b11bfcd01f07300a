// The Python module and the operators that say what was built. Importing it registers every operator of the library.
#include <Python.h>

#include "../kernels/build_info.h"
#include "common.h"

#if !defined(FISNET_EMU)
PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) { m.def("build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(fisnet, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&fisnet::build_info)); }
#endif
