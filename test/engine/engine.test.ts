// The life of an engine: calls in the wrong order, at the same time or too late, and engines side by side.

import { spawnSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { root } from '../helpers/fixture.js';
import { targets } from '../helpers/op.js';
import { load, logitsOf, openModel, plan, readyModel, refusal, smallBatch } from '../helpers/op-model.js';

describe('a call', () => {
  it('before prepare is refused', async () => {
    const engine = await load(openModel());
    engine.begin(smallBatch());
    expect(await refusal(() => engine.run(0))).toMatchObject({
      code: 'TP_PLAN',
      message: 'run before prepare',
    });
    expect(await refusal(() => engine.syncBuffers(0))).toMatchObject({ code: 'TP_PLAN' });
  });

  it('to run before begin is refused', async () => {
    const engine = await readyModel();
    expect(await refusal(() => engine.run(0))).toMatchObject({
      code: 'TP_BATCH',
      message: 'run before begin',
    });
  });

  it('to run from a step that does not exist is refused', async () => {
    const engine = await readyModel();
    engine.begin(smallBatch());
    const count = plan.steps.length;
    for (const from of [-1, count + 1])
      expect(await refusal(() => engine.run(from))).toMatchObject({
        code: 'TP_PLAN',
        message: `run from step ${from} of ${count}`,
      });
    expect(await engine.run(0)).toBe(count);
  });

  it('for the buffers of a step that is no sync point is refused', async () => {
    const engine = await readyModel();
    engine.begin(smallBatch());
    for (const index of [-1, 0, plan.steps.length])
      expect(await refusal(() => engine.syncBuffers(index))).toMatchObject({
        code: 'TP_PLAN',
        message: `step ${index} is no sync point`,
      });
  });

  it('to time a device collective that the engine does not have is refused', async () => {
    const engine = await readyModel();
    expect(await refusal(() => engine.timeAllReduce(16, 2, 0, true))).toMatchObject({
      code: 'TP_PLAN',
      message: 'collective local has nothing to join',
    });
  });

  it('for a buffer that does not exist, or with values that do not fit it, is refused', async () => {
    const engine = await readyModel();
    engine.begin(smallBatch());
    for (const work of [
      () => engine.readBuffer('attic'),
      () => engine.writeBuffer('attic', new Float32Array(1)),
    ])
      expect(await refusal(work)).toMatchObject({ code: 'TP_PLAN', message: "no buffer 'attic'" });
    expect(await refusal(() => engine.writeBuffer('hidden', new Float32Array(7)))).toMatchObject({
      code: 'TP_PLAN',
      message: 'buffer hidden takes 192 floats, not 7',
    });
    const doubles = new Float64Array(192) as unknown as Float32Array;
    expect(await refusal(() => engine.writeBuffer('hidden', doubles))).toMatchObject({ code: 'TP_PLAN' });
  });

  it('while another is at work is refused, and the other is unharmed', async () => {
    const engine = await readyModel();
    const clean = await logitsOf(engine);
    engine.begin(smallBatch());
    const running = engine.run(0);
    for (const work of [
      () => engine.begin(smallBatch({ tokens: Int32Array.of(5, 5, 5) })),
      () => engine.result(),
      () => engine.logits(),
      () => engine.readBuffer('hidden'),
      () => engine.stats(),
    ])
      expect(await refusal(work)).toMatchObject({ code: 'TP_NATIVE', message: /still at work/ });
    await running;
    expect(engine.logits()).toEqual(clean);
  });

  it('after close is refused', async () => {
    const engine = await readyModel();
    await logitsOf(engine);
    engine.close();
    engine.close();
    for (const work of [
      () => engine.begin(smallBatch()),
      () => engine.run(0),
      () => engine.prepare(),
      () => engine.result(),
      () => engine.logits(),
      () => engine.readBuffer('hidden'),
      () => engine.syncBuffers(0),
      () => engine.trace(),
      () => engine.plantFault(null),
      () => engine.stats(),
      () => engine.readBandwidth(0.01),
      () => engine.synthesize('norm.weight', { shape: [64], start: [0], stop: [64] }, [0, 0], 1, 0),
    ])
      expect(await refusal(work)).toMatchObject({ code: 'TP_NATIVE', message: 'the engine is closed' });
  });
});

describe('an engine', () => {
  it('that is closed in the middle of a run finishes the run first', async () => {
    const engine = await readyModel();
    engine.begin(smallBatch());
    const runs = [engine.run(0), engine.run(0)];
    engine.close();
    expect(await Promise.all(runs)).toEqual([plan.steps.length, plan.steps.length]);
  });

  it('leaves no view of its memory behind when it is closed', async () => {
    const engine = await readyModel(() => ({ collective: 'host' }));
    engine.begin(smallBatch());
    const { send } = engine.syncBuffers(await engine.run(0));
    expect(send).toHaveLength(3 * 64);
    engine.close();
    expect(send).toHaveLength(0);
  });

  it('lives beside others without a trace of them', async () => {
    const alone = [0, 1].map(async (seed) => {
      return logitsOf(await readyModel(undefined, seed));
    });
    const want = await Promise.all(alone);
    expect(want[0]).not.toEqual(want[1]);
    const engines = await Promise.all(
      [0, 1, 0].map(async (seed) => {
        return readyModel(undefined, seed);
      }),
    );
    for (let turn = 0; turn < 3; turn++) {
      const got = await Promise.all(engines.map((engine) => logitsOf(engine)));
      expect(got).toEqual([want[0], want[1], want[0]]);
    }
  });

  it.each(['idle', 'at work', 'dropped'])(
    'that is never closed and %s does not keep its process',
    (state) => {
      const script = `
      import { createRequire } from 'node:module';
      const { Engine } = createRequire(import.meta.url)(${JSON.stringify(`${root}/build/tp_run.node`)});
      const size = 1 << 20;
      let engine = new Engine({
        device: 'cpu', dtype: 'float32', collective: 'host', isa: 'auto', deviceIndex: 0, threads: 2,
        rank: 0, size: 1,
        model: { hidden: 8, vocab: 8, intermediate: 8, moeIntermediate: 8, experts: 1, topK: 1, eps: 1e-6,
                 softcap: 0, leaves: 1, embedScale: 1 },
        layers: [], tensors: [{ name: 'w', shape: [size] }], steps: [],
        limits: { tokens: 1, rows: 1, sequences: 1, positions: 1, candidates: 1 }, trace: false,
      });
      const slice = { shape: [size], start: [0], stop: [size] };
      const done = engine.synthesize('w', slice, [1, 2], 1, 0).then(() => console.log('done'));
      const state = ${JSON.stringify(state)};
      if (state === 'idle') await done;
      if (state === 'dropped') { engine = null; globalThis.gc(); }
    `;
      const { status, stdout, stderr } = spawnSync(
        process.execPath,
        ['--expose-gc', '--input-type=module', '-e', script],
        { timeout: 20_000, encoding: 'utf8' },
      );
      expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: 'done\n', stderr: '' });
    },
  );

  it('that is never closed does not stand in the way of another when their process ends', () => {
    const script = `
      import { createRequire } from 'node:module';
      const { Engine } = createRequire(import.meta.url)(${JSON.stringify(`${root}/build/tp_run.node`)});
      const make = () => new Engine({
        device: 'cpu', dtype: 'float32', collective: 'host', isa: 'auto', deviceIndex: 0, threads: 1,
        rank: 0, size: 1,
        model: { hidden: 8, vocab: 8, intermediate: 8, moeIntermediate: 8, experts: 1, topK: 1, eps: 1e-6,
                 softcap: 0, leaves: 1, embedScale: 1 },
        layers: [], tensors: [{ name: 'w', shape: [8] }], steps: [],
        limits: { tokens: 1, rows: 1, sequences: 1, positions: 1, candidates: 1 }, trace: false,
      });
      globalThis.engines = [make(), make(), make()];
    `;
    const { status, signal, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
      timeout: 20_000,
      encoding: 'utf8',
    });
    expect({ status, signal, stderr }).toEqual({ status: 0, signal: null, stderr: '' });
  });

  it('counts what it holds and what its steps read', async () => {
    const engine = await readyModel();
    const { weightBytes, cacheBytes } = engine.stats();
    const stored = plan.tensors.reduce((n, t) => n + 2 * t.shape.reduce((a, b) => a * b, 1), 0);
    expect(weightBytes).toBeGreaterThanOrEqual(stored);
    expect(weightBytes).toBeLessThan(stored + 64 * plan.tensors.length);
    // Five rings of 16 + 16 - 1 positions, one full layer of 64; 2 sequences, k and v, 2 bytes.
    expect(cacheBytes).toBe(5 * 31 * 2 * 32 * 2 * 2 * 2 + 64 * 64 * 2 * 2 * 2);
    expect(engine.stats().readBytes).toBe(0);
    await logitsOf(engine);
    const read = engine.stats();
    expect(read.readBytes).toBeGreaterThan(0);
    expect(read.readBytes).toBeLessThan(2 * stored);
    // 3 tokens choose between 4 and 12 experts in each of 6 layers.
    expect(read.expertsRead).toBeGreaterThanOrEqual(24);
    expect(read.expertsRead).toBeLessThanOrEqual(72);
    expect(engine.stats()).toMatchObject({ readBytes: 0, expertsRead: 0 });
  });

  it.each([
    ['NaN', Number.NaN],
    ['infinite', Number.POSITIVE_INFINITY],
  ])('with %s weights says that there is no next token', async (_, value) => {
    const engine = await load(openModel());
    const { name, slice } = plan.tensors.find((t) => t.name === 'norm.weight')!;
    await engine.synthesize(name, slice, [0, 0], 0, value);
    await engine.prepare();
    await logitsOf(engine);
    expect(await refusal(() => engine.result())).toMatchObject({
      code: 'TP_NATIVE',
      message: expect.stringMatching(/logits behind position 2 of slot 0 are not numbers/),
    });
  });

  it.each(targets)('runs on $name with more threads than there is work', async ({ device, isa }) => {
    const one = await readyModel((s) => ({ ...s, device, isa }));
    const many = await readyModel((s) => ({ ...s, device, isa, threads: 13 }));
    expect(await logitsOf(many)).toEqual(await logitsOf(one));
  });
});
