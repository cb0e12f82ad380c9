// The resident kernel (kernel.cuh) for steps of up to 16 tokens.
#define TP_TOKENS 16
#define TP_RESIDENT tp::cuda::resident::up_to_16
#include "ops/cuda/resident/kernel.cuh"
