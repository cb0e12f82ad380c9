// Every op of native/ops/ops.h once more, for one token, in double precision and without any order of sums worth
// naming: what the native ops are compared with. r rounds where the contract marks r.

import type { Dtype } from '../../src/native.js';

export type Vector = Float64Array;
/** Rows. */
export type Matrix = Vector[];
export type Round = (value: number) => number;

const bits = new Uint32Array(1);
const float = new Float32Array(bits.buffer);

/** The nearest bfloat16 value, ties to even. */
export function toBfloat16(value: number): number {
  float[0] = value;
  bits[0] = (bits[0]! + 0x7fff + ((bits[0]! >>> 16) & 1)) & 0xffff0000;
  return float[0];
}

/** The rounding points of a run. */
export const rounding = (dtype: Dtype): Round => (dtype === 'bfloat16' ? toBfloat16 : (value) => value);

/** Row-major values as rows of `width`. */
export function rowsOf(values: ArrayLike<number>, width: number): Matrix {
  const all = Float64Array.from(values);
  return Array.from({ length: all.length / width }, (_, i) => all.subarray(i * width, (i + 1) * width));
}

export function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}

export const times = (weight: Matrix, x: Vector): Vector => Float64Array.from(weight, (row) => dot(row, x));

export const add = (a: Vector, b: Vector): Vector => a.map((value, i) => value + b[i]!);

/** RMSNorm; without a weight when it is null. */
export function norm(x: Vector, weight: Vector | null, eps: number, r: Round): Vector {
  const inverse = 1 / Math.sqrt(dot(x, x) / x.length + eps);
  return x.map((value, i) => r(value * inverse * (weight ? weight[i]! : 1)));
}

/** Softmax of a few numbers. */
export function softmax(x: ArrayLike<number>): Vector {
  const max = Math.max(...Array.from(x));
  const powers = Float64Array.from(x, (value) => Math.exp(value - max));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((p) => p / total);
}

export interface Heads {
  heads: number;
  kvHeads: number;
  headDim: number;
  window: number; // 0 = all
  rotaryPairs: number;
  ropeTheta: number;
}

/** Cuts a row into its heads. */
const heads = (row: Vector, dim: number): Matrix => rowsOf(row, dim);

/** Rotates pairs (i, i + D/2), i < rotaryPairs. Frequency and angle are single precision, as the reference has them. */
function rope(x: Vector, position: number, h: Heads, r: Round): Vector {
  const out = x.slice();
  const half = h.headDim / 2;
  for (let i = 0; i < h.rotaryPairs; i++) {
    const frequency = Math.fround(h.ropeTheta ** ((-2 * i) / h.headDim));
    const angle = Math.fround(frequency * position);
    const [cos, sin] = [Math.fround(Math.cos(angle)), Math.fround(Math.sin(angle))];
    out[i] = r(x[i]! * cos - x[i + half]! * sin);
    out[i + half] = r(x[i + half]! * cos + x[i]! * sin);
  }
  return out;
}

export interface QkvWeights {
  q: Matrix;
  k: Matrix;
  v: Matrix | null; // null: v starts from the raw k
  qNorm: Vector;
  kNorm: Vector;
}

/** What one position leaves in the cache: one row a KV head. */
export interface CacheEntry {
  k: Matrix;
  v: Matrix;
}

/** From the normed hidden state of the token at `position`: its queries, and its cache entry. */
export function qkv(a: Vector, position: number, w: QkvWeights, h: Heads, eps: number, r: Round) {
  const project = (weight: Matrix) => heads(times(weight, a).map(r), h.headDim);
  const raw = project(w.k);
  return {
    q: project(w.q).map((x) => rope(norm(x, w.qNorm, eps, r), position, h, r)),
    entry: {
      k: raw.map((x) => rope(norm(x, w.kNorm, eps, r), position, h, r)),
      v: (w.v ? project(w.v) : raw).map((x) => norm(x, null, eps, r)),
    } satisfies CacheEntry,
  };
}

/** One token's queries against all positions up to its own. */
export function attention(q: Matrix, history: readonly CacheEntry[], h: Heads, r: Round): Vector {
  const visible = h.window > 0 ? history.slice(-h.window) : history;
  const out = new Float64Array(h.heads * h.headDim);
  for (const [head, query] of q.entries()) {
    const kv = Math.floor(head / (h.heads / h.kvHeads));
    const p = softmax(visible.map((entry) => dot(query, entry.k[kv]!)));
    for (let i = 0; i < h.headDim; i++)
      out[head * h.headDim + i] = r(visible.reduce((sum, entry, j) => sum + p[j]! * entry.v[kv]![i]!, 0));
  }
  return out;
}

export interface RouteNorms {
  postAttentionNorm: Vector;
  denseNorm: Vector;
  expertNorm: Vector;
  scale: Vector;
}

/** The residual after attention, the two inputs of the FFN half, and z, what the router sees. */
export function routeInputs(sum: Vector, hidden: Vector, w: RouteNorms, eps: number, r: Round) {
  const m = add(hidden, norm(sum.map(r), w.postAttentionNorm, eps, r)).map(r);
  return {
    hidden: m,
    denseIn: norm(m, w.denseNorm, eps, r),
    expertIn: norm(m, w.expertNorm, eps, r),
    z: norm(m, null, eps, r).map((x, i) => r(r(x * w.scale[i]!) / Math.sqrt(m.length))),
  };
}

/** Probabilities of all experts, and the K most probable with their weights; equal ones by the lower id. */
export function choose(logits: Vector, perExpertScale: Vector, topK: number) {
  const probability = softmax(logits);
  const order = Array.from(logits.keys()).sort((a, b) => probability[b]! - probability[a]! || a - b);
  const index = order.slice(0, topK);
  const total = index.reduce((sum, e) => sum + probability[e]!, 0);
  return { probability, index, weight: index.map((e) => (probability[e]! / total) * perExpertScale[e]!) };
}

export function gelu(z: number): number {
  return 0.5 * z * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (z + 0.044715 * z ** 3)));
}

/** r(r gelu(r(x G^T)) * r(x U^T)) */
export function gated(x: Vector, gate: Matrix, up: Matrix, r: Round): Vector {
  return Float64Array.from(gate, (row, i) => r(r(gelu(r(dot(row, x)))) * r(dot(up[i]!, x))));
}

export interface FfnNorms {
  denseNorm: Vector;
  expertNorm: Vector;
  norm: Vector;
  layerScalar: number;
}

/** The layer's output from both sums of the FFN half and the residual. */
export function ffnOut(
  dense: Vector,
  experts: Vector,
  hidden: Vector,
  w: FfnNorms,
  eps: number,
  r: Round,
): Vector {
  const f = add(norm(dense.map(r), w.denseNorm, eps, r), norm(experts.map(r), w.expertNorm, eps, r)).map(r);
  return add(hidden, norm(f, w.norm, eps, r)).map((x) => r(r(x) * w.layerScalar));
}

/** A row of logits from the normed hidden state; softcap 0 = none. */
export function logits(normed: Vector, table: Matrix, softcap: number): Vector {
  return times(table, normed).map((z) => (softcap > 0 ? softcap * Math.tanh(z / softcap) : z));
}
