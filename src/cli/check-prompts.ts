// Prompts for a check when none are given: mixed lengths, the last one longer than the sliding window.

import type { ModelConfig } from '../model/config.js';

const LENGTHS = [1, 4, 9, 16, 23, 31, 40];

/** Eight prompts, the same ones every time, with room for `more` tokens behind each. */
export function checkPrompts({ layers, vocabSize, maxPositions }: ModelConfig, more: number): number[][] {
  const window = Math.max(...layers.map((layer) => layer.window ?? 0));
  const room = Math.max(1, maxPositions - more);
  const next = numbers(1);
  return [...LENGTHS, window + 8].map((length) =>
    Array.from({ length: Math.min(length, room) }, () => next() % vocabSize),
  );
}

/** xorshift32: any well-mixed sequence will do, as long as it is the same everywhere. */
function numbers(seed: number): () => number {
  let x = seed;
  return () => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return x >>> 0;
  };
}
