# SPDX-License-Identifier: Apache-2.0
# What tests run: the CUDA kernels on a CPU, and the programs of tests/kernels. Sanitizers come with the preset's flags.
set(PROGRAMS ${ROOT}/tests/kernels)
set(EMULATED ${CUDA_SOURCES} emulator/runtime.cpp)
set_source_files_properties(${CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
# The runtime tells the thread sanitizer of its fibers itself.
set_source_files_properties(emulator/runtime.cpp PROPERTIES COMPILE_OPTIONS -fno-sanitize=thread)

add_library(quip_vllm_cuda MODULE ${EMULATED})
target_compile_options(quip_vllm_cuda PRIVATE -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas)
target_link_libraries(quip_vllm_cuda PRIVATE stable_torch)

list(REMOVE_ITEM EMULATED ${CUDA_BINDINGS})
add_executable(gemm_check ${EMULATED} ${PROGRAMS}/gemm_check.cpp)
target_include_directories(gemm_check PRIVATE cuda)
target_compile_options(gemm_check PRIVATE -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas)

find_package(Threads REQUIRED)
foreach(name panels panels_planted) # "planted": with an error on purpose, which the sanitizer has to report
  add_executable(${name} ${TIER_OBJECTS} cpu/tiers.cpp ${PROGRAMS}/panels.cpp)
  target_include_directories(${name} PRIVATE cpu)
  target_compile_options(${name} PRIVATE ${COMMON})
  target_link_libraries(${name} PRIVATE Threads::Threads)
endforeach()
target_compile_definitions(panels_planted PRIVATE QUIP_PLANTED)
