#define TP_TOKENS 16
#define TP_RESIDENT tp::cuda::resident::up_to_16
#include "ops/cuda/resident/kernel.cuh"
