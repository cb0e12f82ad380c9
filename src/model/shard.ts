// Which part of every checkpoint tensor a rank owns: one table and pure functions, no I/O.

import { fail } from '../errors.js';
import type { LayerConfig, ModelConfig } from './config.js';

/** Most virtual shards: the finest TP degree whose sums tp-run can reproduce. */
export const MAX_LEAVES = 8;

/** A box of a tensor: axes [start, stop) of `shape`, a row-major view of the stored tensor. */
export interface Slice {
  shape: readonly number[];
  start: readonly number[];
  stop: readonly number[];
}

/** How one tensor of the checkpoint is split. */
export interface TensorSplit {
  /** Name without the checkpoint's prefix. */
  name: string;
  /** Shape as stored. */
  shape: readonly number[];
  /** The same elements seen with the split axis on its own, e.g. gate_up [experts, 2, width, hidden]. */
  view: readonly number[];
  /** Axis of `view` that ranks divide; null = every rank holds all of it. */
  axis: number | null;
  /** The axis of `shape` that shrinks with it. */
  storedAxis: number;
  /** With fewer units than ranks (KV heads), neighbouring ranks hold the same one. */
  replicate: boolean;
}

/** The split of every tensor that a text model reads, in plan order. */
export function tensorSplits(config: ModelConfig): TensorSplit[] {
  const { hiddenSize: h, intermediateSize, moeIntermediateSize: n, numExperts: experts } = config;
  const whole = (name: string, ...shape: number[]): TensorSplit => ({
    name,
    shape,
    view: shape,
    axis: null,
    storedAxis: 0,
    replicate: false,
  });
  const rows = (name: string, units: number, unit: number): TensorSplit => ({
    name,
    shape: [units * unit, h],
    view: [units, unit, h],
    axis: 0,
    storedAxis: 0,
    replicate: false,
  });
  const columns = (name: string, units: number, unit: number): TensorSplit => ({
    name,
    shape: [h, units * unit],
    view: [h, units, unit],
    axis: 1,
    storedAxis: 1,
    replicate: false,
  });
  const layer = (l: LayerConfig, i: number): TensorSplit[] => {
    const p = `layers.${i}.`;
    const kv = (name: string) => ({ ...rows(name, l.numKvHeads, l.headDim), replicate: true });
    return [
      whole(`${p}input_layernorm.weight`, h),
      rows(`${p}self_attn.q_proj.weight`, l.numHeads, l.headDim),
      kv(`${p}self_attn.k_proj.weight`),
      ...(l.kEqV ? [] : [kv(`${p}self_attn.v_proj.weight`)]),
      whole(`${p}self_attn.q_norm.weight`, l.headDim),
      whole(`${p}self_attn.k_norm.weight`, l.headDim),
      columns(`${p}self_attn.o_proj.weight`, l.numHeads, l.headDim),
      whole(`${p}post_attention_layernorm.weight`, h),
      whole(`${p}pre_feedforward_layernorm.weight`, h),
      whole(`${p}pre_feedforward_layernorm_2.weight`, h),
      whole(`${p}router.scale`, h),
      whole(`${p}router.proj.weight`, experts, h),
      whole(`${p}router.per_expert_scale`, experts),
      rows(`${p}mlp.gate_proj.weight`, intermediateSize, 1),
      rows(`${p}mlp.up_proj.weight`, intermediateSize, 1),
      {
        name: `${p}experts.gate_up_proj`,
        shape: [experts, 2 * n, h],
        view: [experts, 2, n, h],
        axis: 2,
        storedAxis: 1,
        replicate: false,
      },
      columns(`${p}mlp.down_proj.weight`, intermediateSize, 1),
      {
        name: `${p}experts.down_proj`,
        shape: [experts, h, n],
        view: [experts, h, n],
        axis: 2,
        storedAxis: 2,
        replicate: false,
      },
      whole(`${p}post_feedforward_layernorm_1.weight`, h),
      whole(`${p}post_feedforward_layernorm_2.weight`, h),
      whole(`${p}post_feedforward_layernorm.weight`, h),
      whole(`${p}layer_scalar`, 1),
    ];
  };
  return [
    // Every rank holds the whole table: it saves a sync after the embedding, and the head reads its own rows of it.
    whole('embed_tokens.weight', config.vocabSize, h),
    ...config.layers.flatMap(layer),
    whole('norm.weight', h),
  ];
}

/** The part of a tensor that `rank` of `size` owns. */
export function sliceOf(split: TensorSplit, rank: number, size: number): Slice {
  const { view: shape, axis } = split;
  const start = shape.map(() => 0);
  const stop = [...shape];
  if (axis !== null) [start[axis], stop[axis]] = share(shape[axis]!, rank, size, split.replicate);
  return { shape, start, stop };
}

/** Units [start, stop) of `count` that belong to `rank`. */
export function share(count: number, rank: number, size: number, replicate = false): [number, number] {
  if (count % size === 0) return [(rank * count) / size, ((rank + 1) * count) / size];
  if (replicate && size % count === 0) {
    const unit = Math.floor((rank * count) / size);
    return [unit, unit + 1];
  }
  throw fail('TP_SHARD_UNEVEN', count, 'units', size, [1]);
}

/** Elements in a slice. */
export function sliceSize(slice: Slice): number {
  return slice.start.reduce((n, from, axis) => n * (slice.stop[axis]! - from), 1);
}

/** V, the number of virtual shards: the largest power of two up to MAX_LEAVES that every split dimension allows. */
export function leavesOf(config: ModelConfig): number {
  let leaves = MAX_LEAVES;
  while (leaves > 1 && obstacle(config, leaves)) leaves /= 2;
  return leaves;
}

/** Refuses a number of ranks that the shapes cannot be split over; TP_SHARD_UNEVEN. */
export function requireSplittable(config: ModelConfig, size: number): void {
  const legal = [1, 2, 4, 8].filter((n) => n <= leavesOf(config));
  if (legal.includes(size)) return;
  const [count, what] = obstacle(config, size) ?? [leavesOf(config), 'virtual shards'];
  throw fail('TP_SHARD_UNEVEN', count, what, size, legal);
}

/** The first dimension that `size` ranks cannot share, or null. */
function obstacle(config: ModelConfig, size: number): [count: number, what: string] | null {
  for (const l of config.layers) {
    if (l.numHeads % size) return [l.numHeads, 'query heads'];
    if (l.numKvHeads % size && size % l.numKvHeads) return [l.numKvHeads, 'KV heads'];
  }
  if (config.intermediateSize % size) return [config.intermediateSize, 'columns of the dense MLP'];
  if (config.moeIntermediateSize % size) return [config.moeIntermediateSize, 'columns of an expert'];
  if (config.vocabSize % size) return [config.vocabSize, 'vocabulary rows'];
  return null;
}
