"""The Triton kernels of kl_loss and linear_kl_loss, and their launchers."""
