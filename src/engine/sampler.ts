// What sampling asks of a step: how many candidates must be gathered, and one row's settings for the native sampler
// (native/ops/cpu/sample.cc), which every rank runs on the same bytes.

import type { Sampling } from './job.js';

/**
 * Candidates that each virtual vocabulary shard of `shardTokens` tokens must offer: greedy and unfiltered sampling
 * need its best one, top-k could take all k from it, and top-p alone could need every token.
 */
export function candidatesFor(sampling: Sampling, shardTokens: number): number {
  if (sampling.temperature === 0) return 1;
  if (sampling.topK > 0) return Math.min(sampling.topK, shardTokens);
  return sampling.topP < 1 ? shardTokens : 1;
}
