// Fills an engine with this rank's weights, from a checkpoint or from a seed.

import { fromNative, type NativeEngine } from '../native.js';
import type { Checkpoint } from './checkpoint.js';
import type { ModelConfig } from './config.js';
import type { Plan, PlannedTensor } from './plan.js';
import { sliceSize } from './shard.js';
import { syntheticKey, syntheticScale } from './synthetic.js';

/** Where weights come from, opened: a checkpoint, or the seed of a synthetic model. */
export type WeightSource =
  | { kind: 'checkpoint'; checkpoint: Checkpoint }
  | { kind: 'synthetic'; seed: number; config: ModelConfig };

/** Bytes that this rank holds when it is loaded (BF16). */
export function weightBytes(plan: Plan): number {
  return plan.tensors.reduce((bytes, { slice }) => bytes + 2 * sliceSize(slice), 0);
}

/**
 * Loads every tensor of `plan`, one after another; native code reads or computes only this rank's slices.
 * `onProgress` gets the bytes done so far, up to `weightBytes(plan)`. Throws TP_FILE_CHANGED when a checkpoint file
 * did not stay the same, and the engine's own errors.
 */
export async function loadWeights(
  engine: NativeEngine,
  plan: Plan,
  source: WeightSource,
  onProgress: (bytes: number) => void = () => {},
): Promise<void> {
  let bytes = 0;
  try {
    for (const tensor of plan.tensors) {
      await loadTensor(engine, tensor, source);
      bytes += 2 * sliceSize(tensor.slice);
      onProgress(bytes);
    }
  } catch (error) {
    // A short read has a better reason than its own when the file changed under it.
    if (source.kind === 'checkpoint') source.checkpoint.requireUnchanged();
    throw fromNative(error);
  }
  if (source.kind === 'checkpoint') source.checkpoint.requireUnchanged();
}

function loadTensor(
  engine: NativeEngine,
  { name, slice }: PlannedTensor,
  source: WeightSource,
): Promise<void> {
  if (source.kind === 'checkpoint') {
    const { fd, offset } = source.checkpoint.tensor(name);
    return engine.readTensor(name, slice, fd, offset);
  }
  const { scale, offset } = syntheticScale(name, source.config);
  return engine.synthesize(name, slice, syntheticKey(source.seed, name), scale, offset);
}
