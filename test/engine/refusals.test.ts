// Specs, plans and batches that an engine must refuse by code and with the values that are wrong.

import { describe, expect, it } from 'vitest';
import { loadWeights } from '../../src/model/weights.js';
import { type Batch, type EngineSpec, type NativeStep, native } from '../../src/native.js';
import { batchOf } from '../helpers/op.js';
import {
  config,
  load,
  logitsOf,
  openModel,
  plan,
  readyModel,
  refusal,
  smallBatch,
} from '../helpers/op-model.js';

describe('a spec', () => {
  const model = (more: Partial<EngineSpec['model']>) => (s: EngineSpec) => ({
    model: { ...s.model, ...more },
  });
  const limits = (more: Partial<EngineSpec['limits']>) => (s: EngineSpec) => ({
    limits: { ...s.limits, ...more },
  });
  const layer = (more: object) => (s: EngineSpec) => ({
    layers: s.layers.map((l, i) => (i === 3 ? { ...l, ...more } : l)),
  });

  it.each<[string, (spec: EngineSpec) => object, string, RegExp]>([
    ['no hidden size', model({ hidden: 0 }), 'TP_PLAN', /hidden size is 0/],
    ['a negative width', model({ intermediate: -8 }), 'TP_PLAN', /dense width is -8/],
    ['no expert', model({ experts: 0 }), 'TP_PLAN', /experts is 0/],
    ['more chosen experts than there are', model({ topK: 17 }), 'TP_PLAN', /17 experts a token of only 16/],
    ['no virtual shard', model({ leaves: 0 }), 'TP_PLAN', /virtual shards is 0/],
    ['three virtual shards', model({ leaves: 3, vocab: 510 }), 'TP_PLAN', /^3 virtual shards/],
    ['too many virtual shards', model({ leaves: 16 }), 'TP_PLAN', /^16 virtual shards.*1, 2, 4 or 8/],
    ['a vocabulary that does not divide', model({ vocab: 510 }), 'TP_PLAN', /vocabulary 510/],
    ['token ids of more than 24 bits', model({ vocab: 2 ** 24 }), 'TP_PLAN', /24 bits/],
    [
      'more ranks than shards',
      () => ({ size: 8, collective: 'host' }),
      'TP_PLAN',
      /4 virtual shards.*8 ranks/,
    ],
    ['a rank outside the group', () => ({ rank: 1 }), 'TP_PLAN', /rank 1 of 1/],
    ['a negative rank', () => ({ rank: -1 }), 'TP_PLAN', /rank -1 of 1/],
    ['several ranks and no way between', () => ({ size: 2 }), 'TP_PLAN', /local collective.*2 ranks/],
    ['an unknown collective', () => ({ collective: 'pigeon' }), 'TP_PLAN', /no collective 'pigeon'/],
    ['a collective of GPUs', () => ({ collective: 'peer' }), 'TP_PLAN', /peer joins GPUs, not device 'cpu'/],
    ['an unknown device', () => ({ device: 'abacus' }), 'TP_PLAN', /no device 'abacus'/],
    ['an unknown dtype', () => ({ dtype: 'float16' }), 'TP_PLAN', /no dtype 'float16'/],
    ['an unknown instruction set', () => ({ isa: 'mmx' }), 'TP_ISA', /mmx.*generic/],
    ['no thread', () => ({ threads: 0 }), 'TP_PLAN', /threads is 0/],
    ['half a rank', () => ({ rank: 0.5 }), 'TP_PLAN', /whole number for 'rank'/],
    ['text for a number', model({ hidden: '64' as unknown as number }), 'TP_PLAN', /a number for 'hidden'/],
    ['no limits', () => ({ limits: undefined }), 'TP_PLAN', /an object for 'limits'/],
    ['a limit of no tokens', limits({ tokens: 0 }), 'TP_PLAN', /token limit is 0/],
    ['no room for candidates', limits({ candidates: 0 }), 'TP_PLAN', /candidate limit is 0/],
    ['heads that shards cannot share', layer({ heads: 2, kvHeads: 1 }), 'TP_PLAN', /layer 3: 2 query heads/],
    ['KV heads that do not divide', layer({ kvHeads: 3 }), 'TP_PLAN', /layer 3: 4 query heads.*3 KV heads/],
    ['no KV heads', layer({ kvHeads: 0 }), 'TP_PLAN', /layer 3: .* 0 KV heads/],
    ['rotary pairs beyond the head', layer({ rotaryPairs: 17 }), 'TP_PLAN', /layer 3: 17 rotary pairs.*32/],
    ['a negative window', layer({ window: -1 }), 'TP_PLAN', /layer 3: a window of -1/],
    [
      'a tensor twice',
      (s) => ({ tensors: [...s.tensors, s.tensors[0]] }),
      'TP_PLAN',
      /embed_tokens.weight is planned twice/,
    ],
    [
      'an axis of no elements',
      (s) => ({ tensors: [...s.tensors, { name: 'empty', shape: [4, 0] }] }),
      'TP_PLAN',
      /tensor empty has an axis of 0/,
    ],
  ])('with %s is refused', async (_, change, code, message) => {
    expect(await refusal(() => openModel(change))).toMatchObject({
      code,
      message: expect.stringMatching(message),
    });
  });

  it('for CUDA is refused where there is no GPU, or an addon without it', async () => {
    if (native().cuda().devices.length > 0) return;
    expect(await refusal(() => openModel(() => ({ device: 'cuda' })))).toMatchObject({
      code: 'TP_DEVICE',
      message: expect.stringMatching(/(not compiled with CUDA|no usable GPU: .+); use --device cpu/),
    });
  });

  it.each<[string, (spec: EngineSpec) => object]>([
    ['a cache', limits({ sequences: 100_000, positions: 1_000_000 })],
    ['a cache that overflows 64 bits', limits({ sequences: 2 ** 30, positions: 2 ** 30 })],
    ['buffers', limits({ tokens: 2 ** 31 - 1 })],
    ['logits', limits({ rows: 2 ** 31 - 1 })],
    ['weights', (s) => ({ tensors: [...s.tensors, { name: 'huge', shape: [2 ** 31, 2 ** 20] }] })],
    [
      'weights that overflow 64 bits',
      (s) => ({ tensors: [...s.tensors, { name: 'huge', shape: [2 ** 40, 2 ** 40] }] }),
    ],
    [
      'weights that fit one by one',
      (s) => ({
        tensors: Array.from({ length: 4096 }, (_, i) => ({ name: `t${i}`, shape: [2 ** 20, 2 ** 10] })),
        ...limits({})(s),
      }),
    ],
  ])('that asks for too much memory for %s is told what it asked for and what is free', async (_, change) => {
    const { code, message } = await refusal(() => openModel(change));
    expect(code).toBe('TP_MEMORY');
    const [, asked, free] = /^asked for ([\d.]+) GB of host memory, ([\d.]+) GB are free; use/.exec(message)!;
    expect(Number(asked)).toBeGreaterThan(Number(free));
    expect(Number(free)).toBeGreaterThan(0);
  });
});

describe('a plan', () => {
  const steps = (change: (step: NativeStep, i: number) => object) => (s: EngineSpec) => ({
    steps: s.steps.map((step, i) => ({ ...step, ...change(step, i) })),
  });
  const at = (op: string, change: object) => steps((step) => (step.op === op ? change : {}));
  const weight = (op: string, role: string, name: string | null) =>
    steps((step) => {
      const { [role]: _, ...others } = step.weights;
      return step.op === op ? { weights: name === null ? others : { ...others, [role]: name } } : {};
    });

  it.each<[string, (spec: EngineSpec) => object, RegExp]>([
    ['an op that does not exist', at('route', { op: 'roulette' }), /no op 'roulette'/],
    ['an op named like an object’s own', at('embed', { op: 'toString' }), /no op 'toString'/],
    ['a missing weight', weight('qkv', 'k', null), /qkv of layer 0 has no weight 'k'/],
    [
      'a weight that is not held',
      weight('down', 'down', 'layers.0.mlp.up'),
      /layers.0.mlp.up is not in the plan/,
    ],
    [
      'a weight of another shape',
      weight('attnOut', 'o', 'layers.0.mlp.down_proj.weight'),
      /layers.0.mlp.down_proj.weight has shape \[64, 96\], the op needs \[64, 128\]/,
    ],
    [
      'a weight with another number of axes',
      weight('logits', 'norm', 'embed_tokens.weight'),
      /embed_tokens.weight has shape \[512, 64\], the op needs \[64\]/,
    ],
    ['a layer that does not exist', at('attention', { layer: 6 }), /attention names layer 6 of 6/],
    ['a layer below the first', at('qkv', { layer: -1 }), /qkv names layer -1 of 6/],
    [
      'a buffer that cannot be summed',
      at('allReduce', { buffer: 'hidden' }),
      /no buffer 'hidden' to all-reduce/,
    ],
    [
      'a buffer that cannot be gathered',
      at('allGather', { buffer: 'logits' }),
      /no buffer 'logits' to all-gather/,
    ],
  ])('with %s is refused', async (_, change, message) => {
    const engine = await load(openModel(change));
    expect(await refusal(() => engine.prepare())).toMatchObject({
      code: 'TP_PLAN',
      message: expect.stringMatching(message),
    });
  });

  it('is refused while a weight is missing, and works when it has come', async () => {
    const engine = openModel();
    const [first, ...others] = plan.tensors;
    const fill = (tensors: typeof plan.tensors) =>
      loadWeights(engine, { ...plan, tensors }, { kind: 'synthetic', seed: 0, config });
    await fill(others);
    expect(await refusal(() => engine.prepare())).toMatchObject({
      code: 'TP_PLAN',
      message: `tensor ${first!.name} was never loaded`,
    });
    await fill([first!]);
    await engine.prepare();
    expect(await logitsOf(engine)).toHaveLength(512);
  });
});

describe('a batch', () => {
  const i32 = (...values: number[]) => Int32Array.of(...values);

  it.each<[string, Partial<Batch>, RegExp]>([
    ['no tokens', batchOf({ positions: [] }), /0 tokens and 0 rows; the limits are 16 and 4/],
    ['too many tokens', batchOf({ positions: Array(17).fill(0) }), /17 tokens.*limits are 16 and 4/],
    ['too many rows', batchOf({ positions: [0], rows: Array(5).fill(0) }), /1 tokens and 5 rows/],
    [
      'a token past the vocabulary',
      { tokens: i32(2, 512, 4) },
      /token id 512 is outside the vocabulary of 512/,
    ],
    ['a negative token', { tokens: i32(-1, 9, 4) }, /token id -1 is outside/],
    ['a position past the limit', { positions: i32(62, 63, 64) }, /position 64 is outside the 64 positions/],
    ['a negative position', { positions: i32(-1, 0, 1) }, /position -1 is outside/],
    ['a slot past the last', { slots: i32(0, 2, 0) }, /slot 2 of 2/],
    ['a negative slot', { slots: i32(0, 0, -1) }, /slot -1 of 2/],
    ['a row that is no token', { rows: i32(3) }, /row 3 of a step of 3 tokens/],
    ['a negative row', { rows: i32(-1) }, /row -1 of a step/],
    ['a target past the vocabulary', { targets: i32(512) }, /target id 512 is outside/],
    ['a target below "none"', { targets: i32(-2) }, /target id -2 is outside/],
    ['fewer positions than tokens', { positions: i32(0, 1) }, /3 tokens and 1 rows differ in length/],
    ['more slots than tokens', { slots: i32(0, 0, 0, 0) }, /differ in length/],
    ['more targets than rows', { targets: i32(-1, -1) }, /differ in length/],
    ['no temperature', { temperature: new Float32Array() }, /differ in length/],
    ['two top-k', { topK: i32(0, 0) }, /differ in length/],
    ['two top-p', { topP: Float32Array.of(1, 1) }, /differ in length/],
    ['no seed', { seed: new Uint32Array() }, /differ in length/],
    ['no sequence', { sequence: i32() }, /differ in length/],
    ['a negative temperature', { temperature: Float32Array.of(-1) }, /temperature -1/],
    ['a temperature that is no number', { temperature: Float32Array.of(Number.NaN) }, /temperature nan/i],
    ['a negative top-k', { topK: i32(-3) }, /top-k -3/],
    ['a top-p above 1', { topP: Float32Array.of(1.5) }, /top-p 1.5/],
    [
      'a filter that keeps more than is gathered',
      { temperature: Float32Array.of(1), topK: i32(9) },
      /top-k 9 .* need 9 candidates of every virtual shard, the limit is 8/,
    ],
    [
      'a top-p that may need every token',
      { temperature: Float32Array.of(1), topP: Float32Array.of(0.5) },
      /top-p 0.5 need 128 candidates of every virtual shard, the limit is 8/,
    ],
  ])('with %s is refused', async (_, more, message) => {
    const engine = await readyModel();
    const clean = await logitsOf(engine);
    expect(await refusal(() => engine.begin(smallBatch(more)))).toMatchObject({
      code: 'TP_BATCH',
      message: expect.stringMatching(message),
    });
    expect(await logitsOf(engine), 'the engine works on').toEqual(clean);
  });

  it('with an array of another kind is refused by name', async () => {
    const engine = openModel();
    const wrong = { tokens: new Float32Array(3) as unknown as Int32Array };
    expect(await refusal(() => engine.begin(smallBatch(wrong)))).toMatchObject({
      code: 'TP_PLAN',
      message: "expected an Int32Array for 'tokens'",
    });
  });
});
