// Engines of the tiny-moe shape with synthetic weights: small, whole, and open to change.

import { onTestFinished } from 'vitest';
import { readModelConfig } from '../../src/model/config.js';
import { makePlan } from '../../src/model/plan.js';
import { loadWeights } from '../../src/model/weights.js';
import { type Batch, type EngineSpec, type NativeEngine, native } from '../../src/native.js';
import { fixture } from './fixture.js';
import { batchOf } from './op.js';

export const config = readModelConfig(fixture('tiny-moe'));
export const plan = makePlan(config, 0, 1);

export type Change = (spec: EngineSpec) => object;

/** The engine with some fields of its spec changed, empty; closed when the running test ends. */
export function openModel(change: Change = () => ({})): NativeEngine {
  const spec: EngineSpec = {
    ...plan,
    device: 'cpu',
    dtype: 'bfloat16',
    collective: 'local',
    isa: 'auto',
    deviceIndex: 0,
    threads: 1,
    limits: { tokens: 16, rows: 4, sequences: 2, positions: 64, candidates: 8 },
    trace: false,
  };
  const engine = new (native().Engine)({ ...spec, ...change(spec) } as EngineSpec);
  onTestFinished(() => engine.close());
  return engine;
}

export async function load(engine: NativeEngine, seed = 0): Promise<NativeEngine> {
  await loadWeights(engine, plan, { kind: 'synthetic', seed, config });
  return engine;
}

/** Loaded and prepared. */
export async function readyModel(change?: Change, seed = 0): Promise<NativeEngine> {
  const engine = await load(openModel(change), seed);
  await engine.prepare();
  return engine;
}

/** Three tokens, the logits of the last. */
export const smallBatch = (more: Partial<Batch> = {}): Batch => ({
  ...batchOf({ tokens: [2, 9, 4], positions: [0, 1, 2], rows: [2] }),
  ...more,
});

/** The logits of one step. */
export async function logitsOf(engine: NativeEngine, input = smallBatch()): Promise<Float32Array> {
  engine.begin(input);
  await engine.run(0);
  return engine.logits();
}

/** What `work` throws or rejects with. */
export async function refusal(work: () => unknown): Promise<{ code?: string; message: string }> {
  try {
    await work();
  } catch (error) {
    return error as Error & { code?: string };
  }
  throw new Error('nothing was refused');
}
