// The check that every native op makes before it reads a tensor's memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace minitron {

// A tensor whose storage was freed, as ZeRO-3 and FSDP do, keeps its shape. Reading it would crash.
inline void check_memory(const torch::stable::Tensor& x, const char* name) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  STD_TORCH_CHECK(bytes > 0 || x.numel() == 0, name,
                  " has no memory: its storage was freed, as ZeRO-3 and FSDP do outside of the module's "
                  "own forward; gather the parameter first");
}

}  // namespace minitron
