import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { ModelConfig } from '../../src/model/config.js';
import {
  leavesOf,
  requireSplittable,
  share,
  sliceOf,
  sliceSize,
  tensorSplits,
} from '../../src/model/shard.js';
import { anyConfig } from '../helpers/configs.js';

const sizes = (config: ModelConfig) => [1, 2, 4, 8].filter((size) => size <= leavesOf(config));

/** Indices in the stored tensor of every element of a slice. */
function* elements(
  { shape, start, stop }: ReturnType<typeof sliceOf>,
  axis = 0,
  base = 0,
): Generator<number> {
  if (axis === shape.length) return yield base;
  for (let i = start[axis]!; i < stop[axis]!; i++)
    yield* elements({ shape, start, stop }, axis + 1, base * shape[axis]! + i);
}

describe('the shard table', () => {
  it('gives every element of a split tensor to exactly one rank, and of any other to all', () => {
    fc.assert(
      fc.property(anyConfig, (config) => {
        for (const size of sizes(config))
          for (const split of tensorSplits(config)) {
            const count = split.shape.reduce((n, d) => n * d, 1);
            const owners = new Uint8Array(count);
            for (let rank = 0; rank < size; rank++)
              for (const element of elements(sliceOf(split, rank, size))) owners[element]!++;
            const units = split.axis === null ? 1 : split.view[split.axis]!;
            const expected = split.axis === null ? size : split.replicate ? Math.max(1, size / units) : 1;
            expect(
              owners.every((n) => n === expected),
              `${split.name} over ${size}`,
            ).toBe(true);
          }
      }),
      { numRuns: 25 },
    );
  });

  it('views every tensor as the same elements in the same order', () => {
    fc.assert(
      fc.property(anyConfig, (config) => {
        for (const { view, shape } of tensorSplits(config))
          expect(view.reduce((n, d) => n * d, 1)).toBe(shape.reduce((n, d) => n * d, 1));
      }),
    );
  });

  it('gives the ranks that share a KV head the query heads that read it', () => {
    fc.assert(
      fc.property(anyConfig, (config) => {
        for (const size of sizes(config))
          for (const layer of config.layers)
            for (let rank = 0; rank < size; rank++) {
              const [q0, q1] = share(layer.numHeads, rank, size);
              const [kv0, kv1] = share(layer.numKvHeads, rank, size, true);
              const group = layer.numHeads / layer.numKvHeads;
              for (let head = q0; head < q1; head++) {
                const kv = Math.floor(head / group);
                expect(kv >= kv0 && kv < kv1).toBe(true);
                // What the ops do with local numbers must find the same head.
                const local = Math.floor((head - q0) / ((q1 - q0) / (kv1 - kv0)));
                expect(kv0 + local).toBe(kv);
              }
            }
      }),
    );
  });

  it('gives neighbouring ranks neighbouring parts, so that a rank owns whole virtual shards', () => {
    fc.assert(
      fc.property(anyConfig, (config) => {
        const leaves = leavesOf(config);
        for (const size of sizes(config))
          for (const split of tensorSplits(config)) {
            if (split.axis === null || split.replicate) continue;
            for (let rank = 0; rank < size; rank++) {
              const own = sliceOf(split, rank, size);
              const first = sliceOf(split, (rank * leaves) / size, leaves);
              const last = sliceOf(split, ((rank + 1) * leaves) / size - 1, leaves);
              expect(own.start).toEqual(first.start);
              expect(own.stop).toEqual(last.stop);
            }
          }
      }),
    );
  });

  it('halves each expert: rank 1 of 2 holds the second half of gate and of up', () => {
    fc.assert(
      fc.property(anyConfig, (config) => {
        fc.pre(leavesOf(config) > 1);
        const split = tensorSplits(config).find((t) => t.name.endsWith('gate_up_proj'))!;
        const slice = sliceOf(split, 1, 2);
        const n = config.moeIntermediateSize;
        expect(slice.start).toEqual([0, 0, n / 2, 0]);
        expect(slice.stop).toEqual([config.numExperts, 2, n, config.hiddenSize]);
        expect(sliceSize(slice)).toBe(config.numExperts * n * config.hiddenSize);
      }),
    );
  });

  it('accepts exactly the powers of two up to the number of virtual shards', () => {
    fc.assert(
      fc.property(anyConfig, fc.integer({ min: 1, max: 20 }), (config, size) => {
        if (sizes(config).includes(size)) expect(() => requireSplittable(config, size)).not.toThrow();
        else
          expect(() => requireSplittable(config, size)).toThrow(
            expect.objectContaining({ code: 'TP_SHARD_UNEVEN', exitCode: 2 }),
          );
      }),
    );
  });
});
