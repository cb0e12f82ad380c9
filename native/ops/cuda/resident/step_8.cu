// The resident kernel (kernel.cuh) for steps of up to 8 tokens.
#define TP_TOKENS 8
#define TP_RESIDENT tp::cuda::resident::up_to_8
#include "ops/cuda/resident/kernel.cuh"
