/* The CUDA kernels without torch: raw device pointers and a stream. Every function only launches; it never waits. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { DDST_CUDA_BFLOAT16 = 0, DDST_CUDA_FLOAT16 = 1, DDST_CUDA_TFLOAT32 = 2 /* float32 tensors */ };

/* A block-sparse convolution, dilation 1. All tensors are NHWC and dense, their addresses multiples of 16 bytes. */
typedef struct {
  int32_t images, height, width, in_channels;       /* of the forward input */
  int32_t out_height, out_width, out_channels;      /* of the forward output */
  int32_t kernel_height, kernel_width;              /* at most 16 taps */
  int32_t stride_y, stride_x, padding_y, padding_x; /* strides 1 or 2 */
  int32_t block_out, block_in;                      /* packed blocks: 16, 32 or 64 each */
  int32_t dtype;                                    /* DDST_CUDA_... of every tensor; sums are float32 */
} ddst_cuda_conv2d_problem;

/* The forward pass, or the input gradient (the same gather with taps and blocks transposed).
 * forward: output = act(W * input + bias + residual);  input gradient: output = W^T * input, where input is
 * grad_output. */
typedef struct {
  const void* input;
  const void* values;     /* [nnz, block_out, block_in] */
  const int32_t* records; /* the active blocks in the order the kernel walks: ddst/ops/cuda.py, gather_records */
  const void* bias;       /* [channels of the output], or null */
  const void* residual;   /* like the output, or null */
  void* output;
  int32_t input_gradient; /* 0 forward, 1 input gradient */
  int32_t relu;
  int32_t large_tile; /* 1: 256 pixels x 128 channels a block of threads, 0: 128 x 64 */
} ddst_cuda_conv2d_gather_arguments;

/* Null, or why nothing was launched. */
const char* ddst_cuda_conv2d_gather(const ddst_cuda_conv2d_problem* problem,
                                    const ddst_cuda_conv2d_gather_arguments* arguments, void* stream);

#ifdef __cplusplus
}
#endif
