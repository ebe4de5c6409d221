// Schema of the gather op. The kernels register themselves in cpu/*.cpp and cuda/*.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(minitron_kernels, m) {
  // out[..., i, j] = weight[..., rows[i], cols[j]]; without rows or cols that axis is kept whole. They are
  // int64 on weight's device; on the CPU they are checked against weight's shape.
  m.def("gather_channels_(Tensor(a!) out, Tensor weight, Tensor? rows, Tensor? cols) -> ()");
}
