// One op, or a few, on every backend of this machine: engines made from a plan of the steps under test alone.

import { closeSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'vitest';
import {
  type Batch,
  type Device,
  type Dtype,
  type EngineSpec,
  type Isa,
  type NativeEngine,
  type NativeLayer,
  type NativeStep,
  native,
} from '../../src/native.js';
import type { Random } from './op-random.js';
import { type Matrix, rowsOf, toBfloat16 } from './reference.js';

/** The chunk sizes that ops are tested with: every tile of the CPU's loops, and their remainders. */
export const TOKENS = [1, 2, 3, 8, 17, 64];
export const DTYPES: readonly Dtype[] = ['bfloat16', 'float32'];
const LIMIT = 64;

interface Target {
  name: string;
  device: Device;
  isa: Isa;
}

/** Every backend that this addon and this machine have. */
export const targets: readonly Target[] = [
  ...native()
    .version()
    .isa.map((isa): Target => ({ name: `cpu ${isa}`, device: 'cpu', isa })),
  ...(native().cuda().devices.length > 0 ? [{ name: 'cuda', device: 'cuda', isa: 'auto' } as const] : []),
];

/** A weight: random with this deviation around `offset`, or the values given. */
export interface OpWeight {
  shape: readonly number[];
  deviation?: number;
  offset?: number;
  values?: Float32Array;
}

export interface OpPlan {
  model?: Partial<EngineSpec['model']>;
  layer?: Partial<NativeLayer>;
  rank?: number;
  size?: number;
  limits?: Partial<EngineSpec['limits']>;
  steps: readonly NativeStep[];
  weights: Readonly<Record<string, OpWeight>>;
}

/** A step that takes the weights of the same names as its roles. */
export function step(op: string, ...roles: string[]): NativeStep {
  return { op, stage: op, layer: 0, weights: Object.fromEntries(roles.map((r) => [r, r])) };
}

/** A sync point: `run` returns there, so that a test can write what the next op reads. */
export const PAUSE: NativeStep = {
  op: 'allReduce',
  stage: 'pause',
  layer: 0,
  weights: {},
  buffer: 'attnSum',
};

/** Decides which experts gateUp and down work for. */
export const routeStep = step(
  'route',
  'postAttentionNorm',
  'denseNorm',
  'expertNorm',
  'scale',
  'router',
  'perExpertScale',
);

export function routeWeights(hidden: number, experts: number): Record<string, OpWeight> {
  const norm = { shape: [hidden], deviation: 0.2, offset: 1 };
  return {
    postAttentionNorm: norm,
    denseNorm: norm,
    expertNorm: norm,
    // Undoes hidden^-1/2, so that the router's logits have a deviation of 1.5.
    scale: { shape: [hidden], deviation: 0.1 * Math.sqrt(hidden), offset: Math.sqrt(hidden) },
    router: { shape: [experts, hidden], deviation: 1.5 / Math.sqrt(hidden) },
    perExpertScale: { shape: [experts], deviation: 0.2, offset: 1 },
  };
}

export function engineSpec(plan: OpPlan, dtype: Dtype, target: Target): EngineSpec {
  return {
    device: target.device,
    dtype,
    collective: 'host',
    isa: target.isa,
    deviceIndex: 0,
    threads: 2,
    rank: plan.rank ?? 0,
    size: plan.size ?? 1,
    model: {
      hidden: 8,
      vocab: 8,
      intermediate: 8,
      moeIntermediate: 8,
      experts: 1,
      topK: 1,
      eps: 1e-6,
      softcap: 0,
      leaves: 1,
      embedScale: 1,
      ...plan.model,
    },
    layers: [
      {
        heads: 8,
        kvHeads: 1,
        headDim: 2,
        window: 0,
        kEqV: false,
        ropeTheta: 10000,
        rotaryPairs: 1,
        ...plan.layer,
      },
    ],
    tensors: Object.entries(plan.weights).map(([name, { shape }]) => ({ name, shape })),
    steps: plan.steps,
    limits: { tokens: LIMIT, rows: LIMIT, sequences: 2, positions: 256, candidates: 1, ...plan.limits },
    trace: false,
  };
}

type Values = Readonly<Record<string, Float32Array>>;

/** Buffers of whole numbers cannot be made NaN. */
const canPoison = (name: string) => name !== 'routeIndex';

/** The plan on one backend. */
export class OpBench {
  constructor(
    readonly name: string,
    readonly engine: NativeEngine,
    private readonly limits: EngineSpec['limits'],
  ) {}

  /**
   * Runs one step: begins with `batch`, writes `inputs[0]` and runs; at each pause writes the next inputs and goes on.
   * Returns the buffers `outputs`, all NaN before, and checks that nothing was written behind the step's tokens.
   */
  async run(batch: Batch, inputs: readonly Values[], outputs: readonly string[]) {
    const { engine, limits } = this;
    const full = batchOf({ positions: Array(limits.tokens).fill(0), rows: Array(limits.rows).fill(0) });
    engine.begin(full);
    for (const name of outputs.filter(canPoison))
      engine.writeBuffer(name, new Float32Array(engine.readBuffer(name).length).fill(Number.NaN));
    engine.begin(batch);
    let at = 0;
    for (const values of inputs) {
      for (const [name, value] of Object.entries(values)) engine.writeBuffer(name, value);
      at = (await engine.run(at)) + 1;
    }
    const got = Object.fromEntries(outputs.map((name) => [name, engine.readBuffer(name)]));
    engine.begin(full);
    for (const name of outputs.filter(canPoison)) {
      const behind = engine.readBuffer(name).subarray(got[name]!.length);
      expect(behind.every(Number.isNaN), `${this.name}: ${name} behind the last row is untouched`).toBe(true);
    }
    return got;
  }
}

export interface OpBenches {
  benches: readonly OpBench[];
  /** A weight as the ops see it, as rows of its last axis. */
  weights: Readonly<Record<string, Matrix>>;
  close(): void;
}

/** Opens `plan` on every backend, all with the same fresh weights. */
export async function openOps(plan: OpPlan, dtype: Dtype, random: Random): Promise<OpBenches> {
  const filled = Object.entries(plan.weights).map(([name, weight]) => ({
    name,
    weight,
    key: random.key(),
    scale: toBfloat16(((weight.deviation ?? 0.1) * Math.sqrt(3)) / 32767),
    offset: toBfloat16(weight.offset ?? 0),
  }));
  const benches: OpBench[] = [];
  for (const target of targets) {
    const spec = engineSpec(plan, dtype, target);
    const engine = new (native().Engine)(spec);
    benches.push(new OpBench(target.name, engine, spec.limits));
    for (const { name, weight, key, scale, offset } of filled)
      if (weight.values) await fill(engine, name, weight.shape, weight.values);
      else await engine.synthesize(name, whole(weight.shape), key, scale, offset);
    await engine.prepare();
  }
  const weights = filled.map(({ name, weight, key, scale, offset }): [string, Matrix] => {
    const width = weight.shape.at(-1)!;
    if (weight.values) return [name, rowsOf(weight.values, width)];
    const stored = new Uint16Array(weight.shape.reduce((n, d) => n * d, 1));
    native().synthesize(stored, 0, key, scale, offset);
    return [name, rowsOf(fromBfloat16(stored), width)];
  });
  return {
    benches,
    weights: Object.fromEntries(weights),
    close() {
      for (const { engine } of benches) engine.close();
    },
  };
}

/** The slice that is the whole tensor. */
export function whole(shape: readonly number[]) {
  return { shape, start: shape.map(() => 0), stop: shape };
}

/** Fills a tensor with bfloat16 values, by way of a file. */
async function fill(engine: NativeEngine, name: string, shape: readonly number[], values: Float32Array) {
  expect(values).toEqual(values.map(toBfloat16));
  const path = join(tmpdir(), `tp-run-op-${process.pid}-${name}`);
  writeFileSync(
    path,
    Uint16Array.from(new Uint32Array(values.slice().buffer), (b) => b >>> 16),
  );
  const fd = openSync(path, 'r');
  try {
    await engine.readTensor(name, whole(shape), fd, 0);
  } finally {
    closeSync(fd);
    rmSync(path);
  }
}

/** Values of stored bfloat16 bits. */
export function fromBfloat16(stored: Uint16Array): Float32Array {
  return new Float32Array(Uint32Array.from(stored, (b) => b << 16).buffer);
}

/** One step's input with the defaults of a step without sampling. */
export function batchOf(given: {
  positions: readonly number[];
  tokens?: readonly number[];
  slots?: readonly number[];
  rows?: readonly number[];
  targets?: readonly number[];
  sampling?: readonly {
    temperature: number;
    topK: number;
    topP: number;
    seed: number;
    sequence: number;
  }[];
}): Batch {
  const { positions } = given;
  const zeros = positions.map(() => 0);
  const rows = given.rows ?? [];
  const sampling =
    given.sampling ?? rows.map(() => ({ temperature: 0, topK: 0, topP: 1, seed: 0, sequence: 0 }));
  return {
    tokens: Int32Array.from(given.tokens ?? zeros),
    positions: Int32Array.from(positions),
    slots: Int32Array.from(given.slots ?? zeros),
    rows: Int32Array.from(rows),
    targets: Int32Array.from(given.targets ?? rows.map(() => -1)),
    temperature: Float32Array.from(sampling, (s) => s.temperature),
    topK: Int32Array.from(sampling, (s) => s.topK),
    topP: Float32Array.from(sampling, (s) => s.topP),
    seed: Uint32Array.from(sampling, (s) => s.seed),
    sequence: Int32Array.from(sampling, (s) => s.sequence),
  };
}
