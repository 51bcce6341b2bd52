"""One operator a file: Triton kernels, their PyTorch counterpart, the registered operator, the public function."""
