// The sampler of native/ops/ops.h in double precision, over one whole row of logits.

import { softmax, type Vector } from './reference.js';

export interface SamplingRow {
  temperature: number;
  topK: number;
  topP: number;
  seed: number;
  sequence: number;
  position: number;
}

/** log softmax, of the logits as they are. */
export function logProbabilities(logits: ArrayLike<number>): Vector {
  const values = Float64Array.from(logits);
  const max = values.reduce((a, b) => Math.max(a, b));
  const total = values.reduce((sum, x) => sum + Math.exp(x - max), 0);
  return values.map((x) => x - max - Math.log(total));
}

/** Token ids, best first; equal logits by the lower id. */
export function ranking(logits: ArrayLike<number>): number[] {
  return Array.from({ length: logits.length }, (_, id) => id).sort(
    (a, b) => logits[b]! - logits[a]! || a - b,
  );
}

/** The tokens that top-k, then top-p leave: best first. */
export function kept(
  logits: ArrayLike<number>,
  { temperature, topK, topP }: Pick<SamplingRow, 'temperature' | 'topK' | 'topP'>,
): number[] {
  const best = ranking(logits).slice(0, topK > 0 ? topK : logits.length);
  if (topP >= 1) return best;
  const p = softmax(best.map((id) => logits[id]! / temperature));
  let count = 1;
  for (let mass = p[0]!; mass < topP && count < best.length; count++) mass += p[count]!;
  return best.slice(0, count);
}

/** What each kept token scores; the highest wins, equal ones by the lower id. */
export function scores(logits: ArrayLike<number>, row: SamplingRow): Map<number, number> {
  if (row.temperature === 0) return new Map(ranking(logits).map((id) => [id, logits[id]!]));
  return new Map(kept(logits, row).map((id) => [id, logits[id]! / row.temperature + gumbel(row, id)]));
}

/** Standard Gumbel noise of one token: a function of the key, nothing is drawn. */
function gumbel({ seed, sequence, position }: SamplingRow, token: number): number {
  const hash = mix((mix((mix((mix(seed) + sequence) >>> 0) + position) >>> 0) + token) >>> 0);
  return -Math.log(-Math.log(Math.fround((hash >>> 9) + 0.5) / 2 ** 23));
}

function mix(x: number): number {
  x ^= x >>> 16;
  x = Math.imul(x, 0x7feb352d);
  x ^= x >>> 15;
  x = Math.imul(x, 0x846ca68b);
  return (x ^ (x >>> 16)) >>> 0;
}
