import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { readConfigFile } from '../../src/model/configfile.js';
import { makePlan } from '../../src/model/plan.js';
import { leavesOf, sliceSize, tensorSplits } from '../../src/model/shard.js';
import { anyConfig } from '../helpers/configs.js';
import { root } from '../helpers/fixture.js';

/** A model and a place in it: rank of size. */
const placed = anyConfig.chain((config) =>
  fc.constantFrom(...[1, 2, 4, 8].filter((n) => n <= leavesOf(config))).chain((size) =>
    fc.record({
      config: fc.constant(config),
      size: fc.constant(size),
      rank: fc.integer({ min: 0, max: size - 1 }),
    }),
  ),
);

describe('the plan', () => {
  it('uses every tensor that it holds, and holds every tensor that it uses', () => {
    fc.assert(
      fc.property(placed, ({ config, rank, size }) => {
        const plan = makePlan(config, rank, size);
        const used = new Set(plan.steps.flatMap((step) => Object.values(step.weights)));
        expect([...used].sort()).toEqual(plan.tensors.map((t) => t.name).sort());
        expect(used.size).toBe(plan.tensors.length);
        expect(plan.tensors.map((t) => t.name)).toEqual(tensorSplits(config).map((t) => t.name));
      }),
    );
  });

  it('gives every tensor a local shape with as many elements as its slice', () => {
    fc.assert(
      fc.property(placed, ({ config, rank, size }) => {
        for (const { shape, slice } of makePlan(config, rank, size).tensors)
          expect(shape.reduce((n, d) => n * d, 1)).toBe(sliceSize(slice));
      }),
    );
  });

  it('gives the ops shapes that fit the local model', () => {
    fc.assert(
      fc.property(placed, ({ config, rank, size }) => {
        const { model, layers, tensors } = makePlan(config, rank, size);
        const shape = new Map(tensors.map((t) => [t.name, t.shape]));
        const h = model.hidden;
        layers.forEach((l, i) => {
          const of = (name: string) => shape.get(`layers.${i}.${name}`);
          expect(of('self_attn.q_proj.weight')).toEqual([l.heads * l.headDim, h]);
          expect(of('self_attn.k_proj.weight')).toEqual([l.kvHeads * l.headDim, h]);
          expect(of('self_attn.v_proj.weight')).toEqual(l.kEqV ? undefined : [l.kvHeads * l.headDim, h]);
          expect(of('self_attn.o_proj.weight')).toEqual([h, l.heads * l.headDim]);
          expect(of('mlp.gate_proj.weight')).toEqual([model.intermediate, h]);
          expect(of('mlp.down_proj.weight')).toEqual([h, model.intermediate]);
          expect(of('experts.gate_up_proj')).toEqual([model.experts, 2 * model.moeIntermediate, h]);
          expect(of('experts.down_proj')).toEqual([model.experts, h, model.moeIntermediate]);
          expect(l.heads % l.kvHeads).toBe(0);
        });
        expect(shape.get('embed_tokens.weight')).toEqual([model.vocab, h]);
      }),
    );
  });

  it('is the same sequence of steps on every rank of every size', () => {
    fc.assert(
      fc.property(placed, ({ config, rank, size }) => {
        expect(makePlan(config, rank, size).steps).toEqual(makePlan(config, 0, 1).steps);
      }),
    );
  });

  it('syncs twice a layer, right after the steps whose sums ranks share, and once for the candidates', () => {
    fc.assert(
      fc.property(placed, ({ config, rank, size }) => {
        const { steps } = makePlan(config, rank, size);
        const syncs = steps.flatMap((step, i) =>
          step.buffer ? [`${steps[i - 1]!.op}>${step.op} ${step.buffer}`] : [],
        );
        const layer = ['attnOut>allReduce attnSum', 'down>allReduce ffnSum'];
        expect(syncs).toEqual([...config.layers.flatMap(() => layer), 'logits>allGather candidates']);
      }),
    );
  });

  it('reads like the forward pass', () => {
    const { config } = readConfigFile(`${root}/configs/gemma-4-26b-a4b-3layers.json`);
    const { steps, model, layers } = makePlan(config, 1, 2);
    const layer = 'qkv attention attnOut allReduce route gateUp down allReduce ffnOut';
    expect(steps.map((s) => s.op).join(' ')).toBe(`embed ${layer} ${layer} ${layer} logits allGather sample`);
    expect(steps.map((s) => s.layer)).toEqual([
      -1,
      ...[0, 1, 2].flatMap((i) => Array(9).fill(i)),
      -1,
      -1,
      -1,
    ]);
    expect(model).toMatchObject({
      hidden: 2816,
      intermediate: 1056,
      moeIntermediate: 352,
      topK: 8,
      leaves: 8,
    });
    expect(layers[2]).toEqual({
      heads: 8,
      kvHeads: 1,
      headDim: 512,
      window: 0,
      kEqV: true,
      ropeTheta: 1e6,
      rotaryPairs: 64,
    });
    expect(model.embedScale).toBe(Math.fround(Math.sqrt(2816)));
  });

  it('replicates KV heads when there are more ranks than heads', () => {
    const { config } = readConfigFile(`${root}/configs/gemma-4-26b-a4b.json`);
    const kv = (rank: number) =>
      makePlan(config, rank, 8).tensors.find((t) => t.name === 'layers.5.self_attn.k_proj.weight')!.slice;
    expect([0, 3, 4, 7].map((rank) => kv(rank).start[0])).toEqual([0, 0, 1, 1]);
  });

  it('is refused for ranks that do not divide the heads, with the numbers that do', () => {
    const { config } = readConfigFile(`${root}/configs/gemma-4-26b-a4b.json`);
    expect(() => makePlan(config, 0, 3)).toThrow(
      /16 query heads cannot be split over 3 ranks; use 1, 2, 4 or 8/,
    );
  });
});
