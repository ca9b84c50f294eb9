// SPDX-License-Identifier: Apache-2.0
// Stands in for libtorch_cuda.so where only a torch without CUDA is installed: the CUDA library then records that it
// needs a library of this name, and finds torch's own, which is loaded by then, wherever it runs.
int aoti_torch_get_current_cuda_stream(int device, void** stream) { return device == 0 && stream == 0; }
