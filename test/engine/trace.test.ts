// Traces and planted faults: a hash of every stage that no split changes, and one unit in the last place that is
// found where it was put.

import { describe, expect, it } from 'vitest';
import type { ScoreJob, StepReport } from '../../src/engine/job.js';
import type { Dtype, Fault, NativeEngine, TraceEntry } from '../../src/native.js';
import { fixture, golden } from '../helpers/fixture.js';
import { batchOf } from '../helpers/op.js';
import { plan, readyModel } from '../helpers/op-model.js';
import { openGolden } from '../helpers/ranks.js';

const STAGES = ['qkv', 'attention', 'attnOut', 'route', 'gateUp', 'down', 'ffnOut'];
const DTYPES: readonly Dtype[] = ['bfloat16', 'float32'];

/** The buffer that a stage leaves behind, and whether bfloat16 runs round it. */
const OUTPUT: Record<string, { buffer: string; rounded: boolean }> = {
  embed: { buffer: 'hidden', rounded: true },
  qkv: { buffer: 'q', rounded: true },
  attention: { buffer: 'attention', rounded: true },
  attnOut: { buffer: 'attnSum', rounded: false },
  route: { buffer: 'hidden', rounded: true },
  gateUp: { buffer: 'denseAct', rounded: true },
  down: { buffer: 'ffnSum', rounded: false },
  ffnOut: { buffer: 'hidden', rounded: true },
  logits: { buffer: 'logits', rounded: false },
};

const name = (entry: TraceEntry) => `${entry.stage} of ${entry.layer}`;

/** Two sequences; the fault goes to position 1 of slot 1, the fourth token and the second row. */
const tokens = [3, 8, 100, 7, 50];
const batch = batchOf({ tokens, positions: [0, 1, 0, 1, 2], slots: [0, 0, 1, 1, 1], rows: [1, 3, 4] });
const hit = { position: 1, slot: 1 };

async function traced(engine: NativeEngine, fault: Fault | null) {
  engine.plantFault(fault);
  engine.begin(batch);
  await engine.run(0);
  return engine.trace();
}

/** The engine whose plan ends behind a stage. */
const upTo = (stage: string, layer: number, dtype: Dtype) => {
  const last = plan.steps.findLastIndex((s) => s.stage === stage && s.layer === layer);
  return readyModel(() => ({ dtype, trace: true, steps: plan.steps.slice(0, last + 1) }));
};

describe.each(DTYPES)('a planted fault in %s', (dtype) => {
  it.each([
    ['embed', -1],
    ...STAGES.map((stage) => [stage, 0] as const),
    ...STAGES.map((stage) => [stage, 5] as const),
    ['logits', -1],
  ] as const)('at %s of layer %i flips one unit in the last place of one element', async (stage, layer) => {
    const engine = await upTo(stage, layer, dtype);
    const { buffer, rounded } = OUTPUT[stage]!;
    const clean = await traced(engine, null);
    const before = engine.readBuffer(buffer);
    const faulty = await traced(engine, { stage, layer, ...hit });
    const after = engine.readBuffer(buffer);

    const bits = (values: Float32Array) => new Uint32Array(values.buffer);
    const flipped = [...bits(before)].flatMap((b, i) => (b === bits(after)[i] ? [] : [i]));
    const row = stage === 'logits' ? 1 : 3;
    // q and attention: rows of this layer's width, in a buffer as wide as the widest's.
    const { heads, headDim } = plan.layers[Math.max(layer, 0)]!;
    const ofHeads = buffer === 'q' || buffer === 'attention';
    const width = ofHeads ? heads * headDim : before.length / (stage === 'logits' ? 3 : 5);
    expect(flipped).toEqual([row * width]);
    expect(bits(before)[flipped[0]!]! ^ bits(after)[flipped[0]!]!).toBe(
      dtype === 'bfloat16' && rounded ? 0x10000 : 1,
    );

    expect(faulty.map(name)).toEqual(clean.map(name));
    const differing = faulty.filter((entry, i) => `${entry.hashes}` !== `${clean[i]!.hashes}`);
    expect(differing.map(name)).toEqual([`${stage} of ${layer}`]);
    const [entry] = differing;
    const original = clean.find((e) => name(e) === name(entry!))!;
    const wrong = [...entry!.hashes].flatMap((h, i) => (h === original.hashes[i] ? [] : [i]));
    expect(wrong).toEqual([row * entry!.parts]);
  });

  it('shows first where it was put, then everywhere behind it, and is gone when it is taken away', async () => {
    const engine = await readyModel(() => ({ dtype, trace: true }));
    const clean = await traced(engine, null);
    expect(clean.map(name)).toEqual([
      'embed of -1',
      ...plan.layers.flatMap((_, layer) => STAGES.map((stage) => `${stage} of ${layer}`)),
      'logits of -1',
    ]);
    const faulty = await traced(engine, { stage: 'ffnOut', layer: 2, ...hit });
    const differs = (i: number) => `${faulty[i]!.hashes}` !== `${clean[i]!.hashes}`;
    const first = clean.findIndex((_, i) => differs(i));
    expect(name(faulty[first]!)).toBe('ffnOut of 2');
    expect(differs(first + 1)).toBe(true);
    // The other sequence never sees it.
    for (const [i, entry] of faulty.entries()) expect(entry.hashes[0], name(entry)).toBe(clean[i]!.hashes[0]);
    expect(await traced(engine, null)).toEqual(clean);
  });

  it.each<[string, Partial<Fault>]>([
    ['position', { position: 3 }],
    ['slot', { slot: 0, position: 2 }],
    ['layer', { layer: 6 }],
    ['stage', { stage: 'attic' }],
  ])('at a %s that the step does not have changes nothing', async (_, more) => {
    const engine = await readyModel(() => ({ dtype, trace: true }));
    const clean = await traced(engine, null);
    expect(await traced(engine, { stage: 'route', layer: 1, ...hit, ...more })).toEqual(clean);
  });
});

describe('a trace', () => {
  it('is empty unless it was asked for', async () => {
    expect(await traced(await readyModel(), null)).toEqual([]);
  });

  it.each(DTYPES)('holds the hash of a row whatever shares its step, in %s', async (dtype) => {
    const engine = await readyModel(() => ({ dtype, trace: true }));
    const together = await traced(engine, null);
    engine.begin(batchOf({ tokens: tokens.slice(2), positions: [0, 1, 2], slots: [1, 1, 1], rows: [1, 2] }));
    await engine.run(0);
    for (const [i, { hashes, parts, stage }] of engine.trace().entries())
      expect(hashes, stage).toEqual(together[i]!.hashes.subarray((stage === 'logits' ? 1 : 2) * parts));
  });
});

describe.each(DTYPES)('the trace of several ranks in %s', (dtype) => {
  async function tracesOf(checkpoint: string, size: number): Promise<StepReport[][]> {
    const group = await openGolden(fixture(checkpoint), { size, dtype, trace: true });
    const job: ScoreJob = {
      kind: 'score',
      sequences: golden(checkpoint).prompts.map((promptIds, sequence) => ({
        promptIds,
        maxTokens: 0,
        sequence,
      })),
      keepLogits: false,
      fault: null,
    };
    const reports = await group.run(job);
    group.close();
    return reports;
  }

  it.each([
    ['tiny-moe', 2],
    ['tiny-moe', 4],
    ['tiny-moe-hub', 2],
    ['tiny-moe-hub', 8],
  ] as const)('of %s is that of one rank at tp=%i, shards side by side', async (checkpoint, size) => {
    const [one] = await tracesOf(checkpoint, 1);
    const ranks = await tracesOf(checkpoint, size);
    for (const [step, { trace }] of one!.entries())
      for (const [i, entry] of trace!.entries()) {
        const mine = ranks.map((rank) => rank[step]!.trace![i]!);
        expect(mine.map(name)).toEqual(mine.map(() => name(entry)));
        if (!entry.sharded) {
          for (const part of mine) expect(part.hashes, name(entry)).toEqual(entry.hashes);
          continue;
        }
        const rows = entry.hashes.length / entry.parts;
        const parts = entry.parts / size;
        const joined = Array.from({ length: rows }, (_, r) =>
          mine.flatMap(({ hashes }) => [...hashes.subarray(r * parts, (r + 1) * parts)]),
        );
        expect(joined.flat(), name(entry)).toEqual([...entry.hashes]);
      }
  });
});
