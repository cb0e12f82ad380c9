// Bursts: several decode steps without the host between them give what the same steps give one by one.

import { describe, expect, it } from 'vitest';
import type { NativeEngine } from '../../src/native.js';
import { batchOf, targets } from '../helpers/op.js';
import { type Change, load, openModel, plan, readyModel, refusal, smallBatch } from '../helpers/op-model.js';

const STEPS = 20;
const methods = [
  { temperature: 0, topK: 0, topP: 1 },
  { temperature: 1, topK: 0, topP: 1 },
  { temperature: 1.3, topK: 5, topP: 0.9 },
];

/** Two sequences behind their prompts, each asking for its next token. */
async function prompted(change: Change): Promise<NativeEngine> {
  const engine = await readyModel(change);
  engine.begin(batchOf({ tokens: [2, 9, 4, 2, 30], positions: [0, 1, 2, 0, 1], slots: [0, 0, 0, 1, 1] }));
  await engine.run(0);
  return engine;
}

const decodeBatch = (method: (typeof methods)[0], tokens = [7, 8], step = 0) =>
  batchOf({
    tokens,
    positions: [3 + step, 2 + step],
    slots: [0, 1],
    rows: [0, 1],
    sampling: [4, 11].map((sequence) => ({ ...method, seed: 3, sequence })),
  });

describe.each(targets)('a burst on $name', ({ device, isa }) => {
  it.each(methods)('at $temperature, top-k $topK, top-p $topP is its steps one by one', async (method) => {
    const change: Change = () => ({ device, isa });
    const slow = await prompted(change);
    const want: { tokens: number[]; logprobs: number[] } = { tokens: [], logprobs: [] };
    let tokens = [7, 8];
    for (let step = 0; step < STEPS; step++) {
      slow.begin(decodeBatch(method, tokens, step));
      await slow.run(0);
      const result = slow.result();
      tokens = [...result.tokens];
      want.tokens.push(...tokens);
      want.logprobs.push(...result.logprobs);
    }

    const fast = await prompted(change);
    fast.begin(decodeBatch(method));
    const bursts = [await fast.decode(1), await fast.decode(12), await fast.decode(STEPS - 13)];
    expect(bursts.flatMap((b) => [...b.tokens])).toEqual(want.tokens);
    expect(bursts.flatMap((b) => [...b.logprobs])).toEqual(want.logprobs);
    expect(fast.logits()).toEqual(slow.logits());
    const ends = bursts.flatMap((b) => [...b.endMs]);
    expect(ends).toHaveLength(STEPS);
    expect(ends).toEqual([...ends].sort((a, b) => a - b));
  });

  it('counts what all its steps read', async () => {
    const engine = await prompted(() => ({ device, isa }));
    engine.stats();
    engine.begin(decodeBatch(methods[0]!));
    await engine.decode(3);
    const { readBytes, expertsRead } = engine.stats();
    // Two tokens choose between 4 and 8 experts in each of 6 layers of each step.
    expect(expertsRead).toBeGreaterThanOrEqual(3 * 6 * 4);
    expect(expertsRead).toBeLessThanOrEqual(3 * 6 * 8);
    expect(readBytes).toBeGreaterThan(0);
    expect(engine.stats().readBytes).toBe(0);
  });

  it('of numbers that are none ends with an error', async () => {
    const engine = await load(openModel(() => ({ device, isa })));
    const { name, slice } = plan.tensors.find((t) => t.name === 'norm.weight')!;
    await engine.synthesize(name, slice, [0, 0], 0, Number.NaN);
    await engine.prepare();
    engine.begin(decodeBatch(methods[0]!));
    expect(await refusal(() => engine.decode(8))).toMatchObject({
      code: 'TP_NATIVE',
      message: expect.stringMatching(/logits behind position 3 of slot 0 are not numbers/),
    });
  });
});

describe('a burst', () => {
  it.each<[string, number, Change, RegExp]>([
    ['of no steps', 0, () => ({}), /a burst of 0 steps; it takes 1 to 256/],
    [
      'of too many steps',
      257,
      (s) => ({ limits: { ...s.limits, positions: 1000 } }),
      /257 steps; it takes 1/,
    ],
    ['past the last position', 62, () => ({}), /62 steps from position 3 pass the 64 positions/],
    ['through the host', 4, () => ({ collective: 'host' }), /stays on the device, not host/],
  ])('%s is refused', async (_, steps, change, message) => {
    const engine = await readyModel(change);
    engine.begin(decodeBatch(methods[0]!));
    expect(await refusal(() => engine.decode(steps))).toMatchObject({
      code: 'TP_BATCH',
      message: expect.stringMatching(message),
    });
  });

  it('of tokens without a row each is refused', async () => {
    const engine = await readyModel();
    engine.begin(smallBatch());
    expect(await refusal(() => engine.decode(2))).toMatchObject({
      code: 'TP_BATCH',
      message: 'a burst of 3 tokens with 1 rows',
    });
    engine.begin({ ...decodeBatch(methods[0]!), rows: Int32Array.of(1, 0) });
    expect(await refusal(() => engine.decode(2))).toMatchObject({
      code: 'TP_BATCH',
      message: 'a burst whose row 0 is token 1',
    });
  });

  it('before prepare or before begin is refused', async () => {
    const engine = await load(openModel());
    engine.begin(decodeBatch(methods[0]!));
    expect(await refusal(() => engine.decode(1))).toMatchObject({ code: 'TP_PLAN' });
    expect(await refusal(async () => (await readyModel()).decode(1))).toMatchObject({ code: 'TP_BATCH' });
  });
});
