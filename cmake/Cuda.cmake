# SPDX-License-Identifier: Apache-2.0
# The CUDA operator library. Builds on a machine without a GPU and beside a torch without CUDA; the package loads it only
# where torch.cuda.is_available().
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

add_library(tilewright_cuda MODULE csrc/torch/cuda_library.cu ${TILEWRIGHT_DEVICE_SOURCES})
target_include_directories(tilewright_cuda PRIVATE csrc)
target_link_libraries(tilewright_cuda PRIVATE tilewright::torch_stable_cuda)
set_target_properties(tilewright_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
target_compile_options(tilewright_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-gencode=arch=compute_90a,code=sm_90a;--expt-relaxed-constexpr>)
tilewright_baseline(tilewright_cuda)
tilewright_warnings(tilewright_cuda)
install(TARGETS tilewright_cuda LIBRARY DESTINATION lib)
