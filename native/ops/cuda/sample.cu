// The next token from the gathered candidates, a block a row; every rank computes the same from the same
// bytes.
#include "ops/cuda/candidates.cuh"

namespace tp::cuda {

namespace {

/// Sorts n (a power of two) keys by one block: bitonic, in device memory, which lies in the cache.
__device__ void sort_keys(unsigned long long* keys, int n) {
  for (int size = 2; size <= n; size *= 2)
    for (int span = size / 2; span > 0; span /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < n / 2; i += kThreads) {
        const int low = 2 * i - (i & (span - 1)), high = low + span;
        const unsigned long long a = keys[low], b = keys[high];
        if (((low & size) == 0) == (a > b)) keys[low] = b, keys[high] = a;
      }
    }
  __syncthreads();
}

/// How many of the `count` best keys make up the probability top_p, at least one: thread i adds a stretch of
/// them.
__device__ int shortest_prefix(const unsigned long long* keys, int count, float temperature, float top_p) {
  __shared__ float stretch[kThreads];
  __shared__ int kept;
  const int each = (count + kThreads - 1) / kThreads,
            first = min(count, static_cast<int>(threadIdx.x) * each);
  const int last = min(count, first + each);
  const float best = score_of_key(keys[0]);
  const auto weight = [&](int i) { return exp_f32((score_of_key(keys[i]) - best) / temperature); };
  float sum = 0;
  for (int i = first; i < last; i++) sum += weight(i);
  stretch[threadIdx.x] = sum;
  __syncthreads();
  float total = 0, before = 0;
  for (int s = 0; s < kThreads; s++) {
    if (s == static_cast<int>(threadIdx.x)) before = total;
    total += stretch[s];
  }
  if (threadIdx.x == 0) kept = count;
  __syncthreads();
  // The stretch in which the mass first reaches its share says where; only one does.
  float mass = before;
  if (first < last && before < top_p * total)
    for (int i = first; i < last; i++) {
      mass += weight(i);
      if (mass < top_p * total) continue;
      atomicMin(&kept, i + 1);
      break;
    }
  __syncthreads();
  return kept > 0 ? kept : 1;
}

__global__ void __launch_bounds__(kThreads)
    sample_rows(SampleArgs a, Dims d, Input in, unsigned long long* room, int padded) {
  __shared__ unsigned long long best_of[kWarps];
  __shared__ ExpSum leaves[kMaxLeaves];
  __shared__ float targets[kMaxLeaves], found;
  wait_for_inputs();
  let_next_start();
  const int row = blockIdx.x, stride = kSummaryFloats + kCandidateFloats * d.candidates,
            all = d.all_leaves * d.candidates;
  const auto leaf = [&](int l) {
    return a.candidates +
           ((static_cast<int64_t>(l / d.leaves) * in.rows + row) * d.leaves + l % d.leaves) * stride;
  };
  const auto candidate = [&](int i) {
    const float* const from = leaf(i / d.candidates) + kSummaryFloats + i % d.candidates * kCandidateFloats;
    return Candidate{from[0], from[1], from[2]};
  };
  const auto key = [&](int i) {
    const Candidate c = candidate(i);
    return c.token < static_cast<float>(d.vocab) ? key_of(c.score, static_cast<uint32_t>(c.token)) : ~0ull;
  };
  for (int l = threadIdx.x; l < d.all_leaves; l += kThreads)
    leaves[l] = {leaf(l)[0], leaf(l)[1]}, targets[l] = leaf(l)[2];

  const float temperature = in.temperature[row];
  unsigned long long best = ~0ull;
  float logit = 0;
  if (temperature > 0 && (in.top_k[row] > 0 || in.top_p[row] < 1)) {
    unsigned long long* const keys = room + static_cast<int64_t>(row) * padded;
    __shared__ float sums[kWarps];
    float valid[1] = {0};  // a whole number below 2^24: exact
    for (int i = threadIdx.x; i < padded; i += kThreads) keys[i] = i < all ? key(i) : ~0ull;
    sort_keys(keys, padded);
    for (int i = threadIdx.x; i < padded; i += kThreads) valid[0] += keys[i] != ~0ull;
    block_sums(valid, sums);
    int count = static_cast<int>(valid[0]);
    if (in.top_k[row] > 0 && in.top_k[row] < count) count = in.top_k[row];
    if (in.top_p[row] < 1) count = shortest_prefix(keys, count, temperature, in.top_p[row]);
    const auto position = static_cast<uint32_t>(in.position[in.row[row]]);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t token = token_of_key(keys[i]);
      const unsigned long long drawn =
          key_of(score_of_key(keys[i]) / temperature +
                     gumbel(in.seed[row], static_cast<uint32_t>(in.sequence[row]), position, token),
                 token);
      best = drawn < best ? drawn : best;
    }
    best = block_min(best, best_of);
    // A filtered candidate's score is its logit.
    for (int i = threadIdx.x; i < count; i += kThreads)
      if (token_of_key(keys[i]) == token_of_key(best)) sums[0] = score_of_key(keys[i]);
    __syncthreads();
    logit = sums[0];
  } else {
    float of_best = -INFINITY;
    for (int i = threadIdx.x; i < all; i += kThreads) {
      const unsigned long long seen = key(i);
      if (seen < best) best = seen, of_best = candidate(i).logit;
    }
    const unsigned long long own = best;
    best = block_min(best, best_of);
    if (own == best) found = of_best;
    __syncthreads();
    logit = found;
  }
  if (threadIdx.x > 0) return;
  float target = -INFINITY;
  for (int l = 0; l < d.all_leaves; l++) target = targets[l] > target ? targets[l] : target;
  const float log_sum = tree_log_sum_exp(leaves, d.all_leaves);
  a.token[row] = static_cast<int>(token_of_key(best));
  a.logprob[row] = logit - log_sum;
  a.target_logprob[row] = in.target[row] < 0 ? float_of(0x7fc00000u) : target - log_sum;
}

}  // namespace

void sample(const SampleArgs& a, const Dims& d, const Input& in, Backend& backend) {
  if (in.rows == 0) return;
  CudaBackend& cuda = of(backend);
  int padded = 2;
  while (padded < d.all_leaves * d.candidates) padded *= 2;
  auto* const room = static_cast<unsigned long long*>(cuda.workspace(
      "sample", sizeof(unsigned long long) * static_cast<size_t>(padded) * static_cast<size_t>(in.rows)));
  cuda.launch(sample_rows, dim3(static_cast<unsigned>(in.rows)), kThreads, 0, a, d, in, room, padded);
}

}  // namespace tp::cuda
