// The schemas of the library's CUDA ops in the shim's own namespace.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(MINITRON_CUDA_LIBRARY, m) {
  m.def(
      "kl_loss_forward(Tensor student_logits, Tensor teacher_logits, Tensor? mask, int vocab_size, "
      "float beta, float inv_tau, float student_scale, float student_softcap, float teacher_scale, "
      "float teacher_softcap) -> (Tensor loss, Tensor stats)");
  m.def(
      "kl_loss_backward(Tensor grad_loss, Tensor stats, Tensor student_logits, Tensor teacher_logits, "
      "Tensor? mask, int vocab_size, float beta, float inv_tau, float student_scale, float student_softcap, "
      "float teacher_scale, float teacher_softcap) -> Tensor grad_student_logits");
}
