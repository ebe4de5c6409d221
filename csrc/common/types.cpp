#include "common/types.h"

#include <stdexcept>
#include <string>

namespace minitron {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  __builtin_unreachable();
}

void throw_unreadable(DType dtype, DType as) {
  throw std::invalid_argument(std::string("no kernel reads ") + dtype_name(dtype) + " as " + dtype_name(as));
}

}  // namespace minitron
