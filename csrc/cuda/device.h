// Facts of the CUDA runtime, behind a C interface.
#pragma once

extern "C" {
// The text of a cudaError_t.
const char* ddst_cuda_error_text(int error);
// Bytes of shared memory that a CTA may ask for; returns a cudaError_t.
int ddst_cuda_shared_limit(int device, int* bytes);
int ddst_cuda_multiprocessors(int device, int* count);
}
