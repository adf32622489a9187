"""An emulator of CUDA on a CPU, for tests: the same text of a kernel, a fiber for each thread."""
