# SPDX-License-Identifier: Apache-2.0
# What tests run: the CUDA kernels on a CPU, and the programs of tests/kernels. Sanitizers come with the preset's flags.
set(PROGRAMS ${ROOT}/tests/kernels)
set_source_files_properties(${CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
# The emulator tells the thread sanitizer of its fibers itself.
set(EMULATOR emulator/scheduler.cpp emulator/instructions.cpp)
set_source_files_properties(${EMULATOR} PROPERTIES COMPILE_OPTIONS -fno-sanitize=thread)

add_library(quip_vllm_cuda MODULE ${CUDA_SOURCES} ${EMULATOR})
target_compile_options(quip_vllm_cuda PRIVATE -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas -ffp-contract=off)
target_link_libraries(quip_vllm_cuda PRIVATE stable_torch)

# One code of each kind: windows in registers, as integers, in EXL3's order with a constant from memory, a table that is
# copied for the lanes, one that is not, tiles by rows, the grid, the lattice. Another code of such a kind has no address of its own.
set(QUIP_RATES 0x1FE CACHE STRING "The rates at which gemm_check has kernels, a bit each")
set(QUIP_KINDS 1mad 1mad_bytes 3inst_swapped hyb lut pairs_by_rows grid e8p CACHE STRING "The codes of gemm_check")
list(TRANSFORM QUIP_KINDS REPLACE "(.+)" "cuda/gemm_\\1.cu" OUTPUT_VARIABLE KINDS)
add_executable(gemm_check ${KINDS} cuda/rotation.cu cuda/routing.cu ${EMULATOR} ${PROGRAMS}/gemm_check.cpp)
target_include_directories(gemm_check PRIVATE cuda)
target_compile_definitions(gemm_check PRIVATE QUIP_RATES=${QUIP_RATES})
target_compile_options(gemm_check PRIVATE -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas)

set(QUIP_TIER_RATES 0x1FE CACHE STRING "The rates at which panels has kernels")
foreach(tier ${TIERS})
  target_compile_definitions(tier_${tier} PRIVATE QUIP_RATES=${QUIP_TIER_RATES})
endforeach()
find_package(Threads REQUIRED)
foreach(name panels panels_planted) # "planted": with an error on purpose, which the sanitizer has to report
  add_executable(${name} ${TIER_OBJECTS} cpu/tiers.cpp ${PROGRAMS}/panels.cpp)
  target_include_directories(${name} PRIVATE cpu)
  target_compile_options(${name} PRIVATE ${COMMON})
  target_compile_definitions(${name} PRIVATE QUIP_RATES=${QUIP_TIER_RATES})
  target_link_libraries(${name} PRIVATE Threads::Threads)
endforeach()
target_compile_definitions(panels_planted PRIVATE QUIP_PLANTED)
