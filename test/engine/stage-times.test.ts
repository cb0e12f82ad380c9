// Times of every stage, on every backend of this machine: they follow each other, cover the step, and change nothing.

import { describe, expect, it } from 'vitest';
import type { GenerateJob } from '../../src/engine/job.js';
import type { NativeEngine, StageTimes } from '../../src/native.js';
import { fixture } from '../helpers/fixture.js';
import { batchOf, targets } from '../helpers/op.js';
import { config, plan, readyModel, refusal, smallBatch } from '../helpers/op-model.js';
import { openGolden } from '../helpers/ranks.js';

const isSync = (i: number) => plan.steps[i]!.op.startsWith('all');

async function timedStep(engine: NativeEngine): Promise<StageTimes> {
  engine.begin(smallBatch());
  await engine.run(0);
  return engine.stageTimes();
}

describe.each(targets)('stage times on $name', ({ device, isa }) => {
  const ready = () => readyModel(() => ({ device, isa }));

  it('are there for every stage, one behind the other, on the clock of process.hrtime', async () => {
    const engine = await ready();
    await engine.timeStages(true);
    const before = Number(process.hrtime.bigint());
    const { spans, blocks, marks } = await timedStep(engine);
    const after = Number(process.hrtime.bigint());
    expect(spans).toHaveLength(3 * plan.steps.length);
    expect(marks).toHaveLength(3 * plan.steps.length * blocks.length);
    let last = before;
    for (const i of plan.steps.keys()) {
      const [begin, inputs, end] = spans.subarray(3 * i, 3 * i + 3);
      if (isSync(i)) {
        expect([begin, inputs, end]).toEqual([Number.NaN, Number.NaN, Number.NaN]); // nobody to join
        continue;
      }
      expect(begin, `${i}`).toBeGreaterThanOrEqual(last);
      expect(inputs).toBeGreaterThanOrEqual(begin!);
      expect(end).toBeGreaterThanOrEqual(inputs!);
      last = end!;
    }
    expect(last).toBeLessThanOrEqual(after);
  });

  it('count the bytes of every stage, which are those of the step', async () => {
    const engine = await ready();
    await engine.timeStages(true);
    engine.stats();
    const { bytes } = await timedStep(engine);
    const sum = bytes.reduce((all, x) => all + x, 0);
    expect(sum).toBe(engine.stats().readBytes);
    const attention = plan.steps.findIndex(({ op }) => op === 'attention');
    const { kvHeads, headDim } = plan.layers[0]!;
    expect(bytes[attention]).toBe(2 * 3 * kvHeads * headDim * 2); // K and V of three positions
  });

  it('leave the numbers as they are', async () => {
    const [plain, timed] = [await ready(), await ready()];
    await timed.timeStages(true);
    for (const engine of [plain, timed]) {
      engine.begin(smallBatch());
      await engine.run(0);
    }
    expect(timed.logits()).toEqual(plain.logits());
  });

  it('are not there unless asked for, and keep bursts away', async () => {
    const engine = await ready();
    expect(await refusal(async () => timedStep(engine))).toMatchObject({ code: 'TP_PLAN' });
    await engine.timeStages(true);
    engine.begin(batchOf({ tokens: [2], positions: [0], rows: [0] }));
    expect(await refusal(() => engine.decode(2))).toMatchObject({ code: 'TP_BATCH' });
    await engine.timeStages(false);
    await engine.decode(2);
  });
});

describe.each(targets)('a filled cache on $name', ({ device, isa }) => {
  const logitsAt = async (engine: NativeEngine, slot: number) => {
    engine.begin(batchOf({ tokens: [7], positions: [20], slots: [slot], rows: [0] }));
    await engine.run(0);
    return [...engine.logits()];
  };

  it.each(['bfloat16', 'float32'] as const)(
    'holds the same numbers every time, others in every slot, in %s',
    async (dtype) => {
      const [one, two] = [
        await readyModel(() => ({ device, isa, dtype })),
        await readyModel(() => ({ device, isa, dtype })),
      ];
      const empty = await logitsAt(one, 0);
      for (const engine of [one, two]) for (const slot of [0, 1]) await engine.fillCache(slot);
      const filled = await logitsAt(one, 0);
      expect(filled.every(Number.isFinite)).toBe(true);
      expect(filled).not.toEqual(empty);
      expect(await logitsAt(two, 0)).toEqual(filled);
      expect(await logitsAt(two, 1)).not.toEqual(filled);
    },
  );

  it('is refused for a slot that is not there', async () => {
    const engine = await readyModel(() => ({ device, isa }));
    expect(await refusal(() => engine.fillCache(2))).toMatchObject({
      code: 'TP_BATCH',
      message: 'slot 2 of 2',
    });
  });
});

describe('a timed job', () => {
  const job = (more: Partial<GenerateJob> = {}): GenerateJob => ({
    kind: 'generate',
    sequences: [{ promptIds: [2, 3, 5, 7], maxTokens: 4, sequence: 0 }],
    sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
    stopTokenIds: [],
    keepLogits: false,
    fault: null,
    ...more,
  });

  it('reports the times of every step, the syncs of the host among them', async () => {
    const group = await openGolden(fixture('tiny-moe'), { size: 2 });
    const plain = await group.run(job());
    const timed = await group.run(job({ timeStages: true }));
    group.close();
    for (const [rank, reports] of timed.entries()) {
      expect(reports.map(({ rows }) => rows)).toEqual(plain[rank]!.map(({ rows }) => rows));
      for (const { times } of reports) {
        const { begin, end, spans } = times!;
        expect(spans.some(Number.isNaN)).toBe(false);
        expect([...spans]).toEqual([...spans].sort((a, b) => a - b));
        expect(spans[0]).toBeGreaterThanOrEqual(begin);
        expect(spans.at(-1)).toBeLessThanOrEqual(end);
      }
      expect(plain[rank]!.every(({ times }) => times === null)).toBe(true);
    }
  });

  it('begins behind the positions that are filled', async () => {
    const group = await openGolden(fixture('tiny-moe'), { size: 1 });
    const promptIds = Array.from({ length: 200 }, (_, i) => i % config.vocabSize);
    const [reports] = await group.run(
      job({ sequences: [{ promptIds, maxTokens: 3, sequence: 0, filled: 198 }] }),
    );
    group.close();
    expect(reports!.map(({ kind, tokens }) => [kind, tokens.map(({ position }) => position)])).toEqual([
      ['prefill', [198, 199]],
      ['decode', [200]],
      ['decode', [201]],
    ]);
  });
});
