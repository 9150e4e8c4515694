// SPDX-License-Identifier: Apache-2.0
// What a kernel may use of the machine. nvcc gets it from ptx.h, the only file with inline PTX; a C++ compiler gets the
// same names from kernels/emulator, which runs the same kernels on a CPU.
//
//   KERNEL(threads)        before a kernel's name, in place of __global__ void: at most that many threads per block
//   KERNEL(threads, n)     and few enough registers for n such blocks in a multiprocessor
//   DEVICE                 before every other function of the device; HOST_DEVICE where the host calls it, too
//   SHARED(name)           unsigned char* name: the block's shared memory, all dynamic, 16-byte aligned; indeterminate
//   LAUNCH(kernel, grid, block, shared_bytes, stream, ...)   starts it; a std::string, empty unless it could not start
//
// threadIdx, blockIdx, blockDim and gridDim are CUDA's. Pointers to shared memory are ordinary pointers.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include "ptx.h"
#else
#include "../emulator/emulator.h"
#endif
