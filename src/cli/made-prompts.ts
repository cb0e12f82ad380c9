// Prompts made of random ids, the same ones every time: for a check or a measurement that brings none.

import type { ModelConfig } from '../model/config.js';

const CHECK_LENGTHS = [1, 4, 9, 12, 16, 23, 31];

/** Eight prompts of mixed lengths, the last one beyond the sliding window, with room for `more` tokens behind each. */
export function checkPrompts(config: ModelConfig, more: number): number[][] {
  const window = Math.max(...config.layers.map((layer) => layer.window ?? 0));
  const room = Math.max(1, config.maxPositions - more);
  return randomPrompts(
    config,
    [...CHECK_LENGTHS, window + 8].map((length) => Math.min(length, room)),
  );
}

/** A prompt of each length. */
export function randomPrompts({ vocabSize }: ModelConfig, lengths: readonly number[]): number[][] {
  const next = xorshift32(1);
  return lengths.map((length) => Array.from({ length }, () => next() % vocabSize));
}

function xorshift32(seed: number): () => number {
  let x = seed;
  return () => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return x >>> 0;
  };
}
