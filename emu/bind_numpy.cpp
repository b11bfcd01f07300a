// Every launcher of the registry for numpy arrays, without torch: launch("phi_scale", dtype="f32", g=array, skip=None, ...).
// Compiled once for the project's kernels (module fisnet_emu) and once for those of the emulator's own tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <map>

#include "../csrc/device/registry.h"
#include "cuda_emu.h"

namespace py = pybind11;
using namespace py::literals;

namespace {
using fisnet::DType;
using fisnet::Field;
const std::map<std::string, DType> kDTypes = {{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}, {"f64", DType::f64}};
const std::map<std::string, emu::Order> kOrders = {
    {"in order", emu::Order::in_order}, {"reversed", emu::Order::reversed}, {"random", emu::Order::random}};

template <typename T> std::string choices(const std::map<std::string, T>& of) {
  std::string text;
  for (const auto& [name, value] : of) text += (text.empty() ? "'" : ", '") + name + "'";
  return text;
}

const fisnet::LauncherEntry& find(const std::string& name) {
  for (const auto& entry : fisnet::launchers())
    if (entry.name == name) return entry;
  throw py::key_error("no launcher '" + name + "': see launchers()");
}

// One field's value out of a Python object.
class Filler {
 public:
  Filler(const std::string& launcher, const py::dict& values) : launcher_(launcher), values_(values) { emu::clear_allowed(); }
  ~Filler() { emu::clear_allowed(); }
  Filler(const Filler&) = delete;

  void operator()(const Field& field) {
    const py::object value = values_[field.name];
    if (field.in || field.out) {
      void* p = memory(field, value);
      if (field.out) *field.out = p;
      else *field.in = p;
    } else if (field.dtype) {
      const auto found = py::isinstance<py::str>(value) ? kDTypes.find(value.cast<std::string>()) : kDTypes.end();
      if (found == kDTypes.end()) fail(field, "must be one of " + choices(kDTypes));
      *field.dtype = found->second;
    } else if (field.flag) {
      if (!py::isinstance<py::bool_>(value)) fail(field, "must be a bool");
      *field.flag = value.cast<bool>();
    } else if (field.f64) {
      *field.f64 = number<double>(field, value, "a number");
    } else {
      const int64_t n = number<int64_t>(field, value, "an integer");
      if (field.i64) *field.i64 = n;
      else if (n < std::numeric_limits<int>::min() || n > std::numeric_limits<int>::max()) fail(field, "does not fit into 32 bits");
      else *field.i32 = static_cast<int>(n);
    }
  }
  void check_names(const std::vector<std::string>& names) const {
    std::string all;
    for (const std::string& name : names) {
      if (!values_.contains(name)) throw py::type_error(launcher_ + ": missing field '" + name + "'");
      all += " " + name;
    }
    for (const auto& item : values_) {
      const auto given = item.first.cast<std::string>();
      if (std::find(names.begin(), names.end(), given) == names.end())
        throw py::type_error(launcher_ + ": no field '" + given + "'; the fields are" + all);
    }
  }

  static std::vector<std::string> field_names(const fisnet::LauncherEntry& entry) {
    std::vector<std::string> names;
    entry.describe([&](const Field& field) { names.push_back(field.name); });
    return names;
  }

 private:
  [[noreturn]] void fail(const Field& field, const std::string& what) const {
    throw py::type_error(launcher_ + ": field '" + field.name + "' " + what);
  }

  template <typename T> T number(const Field& field, const py::object& value, const char* what) const {
    try {
      if (!py::isinstance<py::bool_>(value)) return value.cast<T>();
    } catch (const py::cast_error&) {
    }
    fail(field, std::string("must be ") + what);
  }
  void* memory(const Field& field, const py::object& value) const {
    if (value.is_none()) return nullptr;
    if (!py::isinstance<py::array>(value)) fail(field, "must be a numpy array or None");
    auto array = value.cast<py::array>();
    if (!(array.flags() & py::array::c_style)) fail(field, "must be contiguous");
    if (field.out && !array.writeable()) fail(field, "must be writeable: the kernel writes it");
    void* p = const_cast<void*>(array.data());
    emu::allow(p, static_cast<size_t>(array.nbytes()), field.out != nullptr, field.name);
    return p;
  }

  const std::string& launcher_;
  const py::dict& values_;
};

void launch(const std::string& name, const py::kwargs& fields) {
  const auto& entry = find(name);
  Filler fill(name, fields);
  fill.check_names(Filler::field_names(entry));
  const int error = entry.run([&](const Field& field) { fill(field); });
  if (error) throw emu::Error(name + ": the kernel did not launch, CUDA error " + std::to_string(error));
}

void config(const std::string& order, uint64_t seed, bool async_random, bool races, bool bounds, size_t max_shared) {
  const auto found = kOrders.find(order);
  if (found == kOrders.end()) throw py::value_error("order must be one of " + choices(kOrders));
  emu::opt = emu::Options{};
  emu::opt.order = found->second;
  emu::opt.seed = seed;
  emu::opt.async_random = async_random;
  emu::opt.check_races = races;
  emu::opt.check_bounds = emu::opt.check_global = bounds;
  emu::opt.max_shared = max_shared;
}

py::dict stats() {
  const emu::Stats s = std::exchange(emu::stats, {});
  py::dict counts;
  for (const auto& [name, count] : emu::kStatNames) counts[name] = s.*count;
  return counts;
}
}  // namespace

PYBIND11_MODULE(FISNET_EMU_MODULE, m) {
  m.doc() = "CUDA kernels on the CPU, for numpy arrays.";
  py::register_exception<emu::Error>(m, "Error", PyExc_RuntimeError);
  m.def("launchers", [] {
    std::vector<std::string> names;
    for (const auto& entry : fisnet::launchers()) names.push_back(entry.name);
    return names;
  }, "The names that launch() takes.");
  m.def("fields", [](const std::string& name) { return Filler::field_names(find(name)); }, "name"_a, "The fields of a launcher's parameters.");
  m.def("launch", &launch, "name"_a,
        "Run a launcher. Fields by name: contiguous arrays (bfloat16 as uint16) or None for pointers, numbers, bools, and\n"
        "'f32', 'bf16', 'f16' or 'f64' for dtypes.");
  m.def("config", &config, py::kw_only(), "order"_a = "in order", "seed"_a = 1, "async_random"_a = false, "races"_a = true,
        "bounds"_a = true, "max_shared"_a = emu::Options{}.max_shared,
        "Set the schedule, what is checked, and the shared memory that a block may have; what is left out goes back to its\n"
        "default.");
  m.def("stats", &stats, "What has been run since the last call.");
}
