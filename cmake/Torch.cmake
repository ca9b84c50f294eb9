# SPDX-License-Identifier: Apache-2.0
# LibTorch's stable ABI for a CMake project, without find_package(Torch).
#
# Gives two targets:
#   tilewright::torch_stable        headers, libtorch and libtorch_cpu: for operators on the CPU
#   tilewright::torch_stable_cuda   the same and libtorch_cuda, by name only: a library for CUDA links even where only the
#                                   CPU build of torch is installed; load it where CUDA is available
#
# Why not find_package(Torch): it drags in the CUDA toolkit that torch itself was built with, overwrites
# CMAKE_CUDA_ARCHITECTURES, and links the Python part into libraries that use none of it. The interpreter that runs the
# build knows where torch lives; asking it costs no import of torch.
find_package(Python REQUIRED COMPONENTS Interpreter)

if(NOT TILEWRIGHT_TORCH_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE TILEWRIGHT_TORCH_ROOT
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${TILEWRIGHT_TORCH_ROOT}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "torch >= 2.10 is needed to build: ${Python_EXECUTABLE} has none. Install torch there and build with "
    "--no-build-isolation, or set TILEWRIGHT_TORCH_ROOT to the folder of the torch package.")
endif()

# The oldest torch whose ABI is used; a newer torch runs the same binary.
set(TILEWRIGHT_TORCH_TARGET "0x020a000000000000" CACHE STRING "TORCH_TARGET_VERSION: 2.10")

add_library(tilewright_torch_headers INTERFACE)
target_include_directories(tilewright_torch_headers SYSTEM INTERFACE "${TILEWRIGHT_TORCH_ROOT}/include")
target_compile_definitions(tilewright_torch_headers INTERFACE TORCH_TARGET_VERSION=${TILEWRIGHT_TORCH_TARGET})
# Checks record the file that they stand in; a binary should not name folders of the machine that built it.
foreach(folder IN ITEMS "${TILEWRIGHT_TORCH_ROOT}/include=torch" "${PROJECT_SOURCE_DIR}=tilewright")
  target_compile_options(tilewright_torch_headers INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${folder}>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-ffile-prefix-map=${folder}>")
endforeach()

add_library(tilewright_torch_stable INTERFACE)
target_link_libraries(tilewright_torch_stable INTERFACE
  tilewright_torch_headers "${TILEWRIGHT_TORCH_ROOT}/lib/libtorch.so" "${TILEWRIGHT_TORCH_ROOT}/lib/libtorch_cpu.so")
add_library(tilewright::torch_stable ALIAS tilewright_torch_stable)

add_library(tilewright_torch_stable_cuda INTERFACE)
target_link_libraries(tilewright_torch_stable_cuda INTERFACE tilewright_torch_stable)
target_compile_definitions(tilewright_torch_stable_cuda INTERFACE USE_CUDA)
enable_language(C)
add_library(tilewright_torch_cuda_stub SHARED csrc/torch/cuda/torch_cuda_stub.c)
set_target_properties(tilewright_torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda C_VISIBILITY_PRESET default LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/stub")
target_link_libraries(tilewright_torch_stable_cuda INTERFACE tilewright_torch_cuda_stub)
add_library(tilewright::torch_stable_cuda ALIAS tilewright_torch_stable_cuda)

# torch is imported before our libraries are loaded, so its libraries are already there: no path is recorded.
set(CMAKE_SKIP_RPATH ON)
