// The Python module _C: facts about the build, nothing else. Loading it runs the static initialisers of the
// other files, which register the ops with torch. No torch header here: pybind11 alone compiles in seconds.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_config.h"  // written by the build
#include "common/cpu/bf16_engines.h"
#include "common/cpu/simd.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

py::list words(const char* text) {
  py::list out;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) out.append(word);
  return out;
}

py::dict interface() {
  py::dict out;
  std::istringstream stream(MINITRON_BUILD_INTERFACE);  // name=digest
  for (std::string word; stream >> word;) {
    const size_t at = word.find('=');
    out[py::str(word.substr(0, at))] = word.substr(at + 1);
  }
  return out;
}

py::object text_or_none(const std::string& text) {
  if (text.empty()) return py::none();
  return py::str(text);
}

py::dict build_info() {
  py::dict info;
  info["version"] = MINITRON_BUILD_VERSION;
  info["compiler"] = compiler();
  info["torch"] = MINITRON_BUILD_TORCH;
  info["simd_compiled"] = words(MINITRON_BUILD_SIMD_COMPILED);
  info["simd_chosen"] = minitron::simd_level_name();
  info["gemm"] = minitron::gemm_engine_report();
  info["bf16_microkernel"] = minitron::brgemm_bf16() != nullptr;
  info["cuda_version"] = text_or_none(MINITRON_BUILD_CUDA_VERSION);
  info["cuda_archs"] = words(MINITRON_BUILD_CUDA_ARCHS);
  info["cuda_reason"] = text_or_none(MINITRON_BUILD_CUDA_REASON);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of minitron_kernels; the ops are under torch.ops.minitron_kernels.";
  m.def("interface", &interface,
        "Digests of what Python and C++ must agree on, see build_backend/interface.py.");
  m.def("build_info", &build_info, "How this extension was built and what it chose on this machine.");
}
