// SPDX-License-Identifier: Apache-2.0
#include "host/rtl.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>

#include "core/require.h"
#include "host/rtl_simulation.h"

namespace tilewright {
namespace {

namespace py = pybind11;

// A simulation on a NumPy array's own bytes.
class Accelerator {
 public:
  Accelerator(py::array memory, uint64_t base, uint64_t latency, uint64_t outstanding, double pause, uint64_t seed)
      : memory_(checked(std::move(memory))),
        simulation_(static_cast<uint8_t*>(memory_.mutable_data()), base, static_cast<uint64_t>(memory_.nbytes()),
                    {latency, outstanding, pause, seed}) {
    require(outstanding >= 1, "Accelerator: outstanding = 0, needed 1 or more");
    require(pause >= 0 && pause < 1, "Accelerator: pause = ", pause, ", needed 0 up to, not with, 1");
  }

  uint64_t run(uint64_t limit, const std::optional<py::function>& progress) {
    const auto tick = [&](uint64_t cycles) {
      const py::gil_scoped_acquire held;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (progress) (*progress)(cycles);
    };
    const py::gil_scoped_release release;
    return simulation_.run(limit, tick);
  }

  void fail(uint64_t begin, uint64_t end, bool reads, bool writes) {
    require(begin < end, "Accelerator.fail: ", begin, " to ", end, ", needed at least a byte");
    simulation_.memory().faults.push_back({begin, end, reads, writes});
  }

  void heal() { simulation_.memory().faults.clear(); }

  py::dict traffic() const {
    py::dict found;
    for (const auto& [name, port] : simulation_.traffic()) {
      found[name.c_str()] = py::make_tuple(port.bursts, port.beats);
    }
    return found;
  }

  rtl::Simulation& simulation() { return simulation_; }
  py::array memory() const { return memory_; }

 private:
  static py::array checked(py::array memory) {
    require(memory.dtype().is(py::dtype::of<uint8_t>()) && memory.ndim() == 1 && memory.writeable() &&
                (memory.flags() & py::array::c_style) != 0,
            "Accelerator: memory is ", std::string(py::str(memory.dtype())), " of ", memory.ndim(),
            " dimensions, needed writable uint8 [bytes]");
    return memory;
  }

  py::array memory_;
  rtl::Simulation simulation_;
};

}  // namespace

void bind_rtl(py::module_& parent) {
  py::class_<Accelerator>(parent, "Accelerator", "The accelerator's RTL, simulated, with memory behind its AXI ports")
      .def(py::init<py::array, uint64_t, uint64_t, uint64_t, double, uint64_t>(), py::arg("memory"),
           py::arg("base") = 0, py::kw_only(), py::arg("latency") = 20, py::arg("outstanding") = 8,
           py::arg("pause") = 0.0, py::arg("seed") = 0)
      .def_property_readonly_static("parameters", [](const py::object&) { return rtl::build_parameters(); })
      .def_property_readonly("memory", &Accelerator::memory)
      .def_property_readonly("cycles", [](Accelerator& self) { return self.simulation().cycles(); })
      .def_property_readonly("traffic", &Accelerator::traffic, "(bursts, beats) of each port since reset")
      .def(
          "read", [](Accelerator& self, uint32_t offset) { return self.simulation().read(offset); }, py::arg("offset"))
      .def(
          "write", [](Accelerator& self, uint32_t offset, uint32_t value) { self.simulation().write(offset, value); },
          py::arg("offset"), py::arg("value"))
      .def("run", &Accelerator::run, py::arg("limit"), py::arg("progress") = py::none(),
           "Start and clock until done; cycles. RuntimeError at an assertion, a breach of AXI or after limit cycles")
      .def("fail", &Accelerator::fail, py::arg("begin"), py::arg("end"), py::arg("reads") = true,
           py::arg("writes") = true, "Answer with errors for addresses from begin up to end")
      .def("heal", &Accelerator::heal, "Forget what fail() said")
      .def("reset", [](Accelerator& self) { self.simulation().reset(); }, "A new design; memory keeps its bytes");
}

}  // namespace tilewright
