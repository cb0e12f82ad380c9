// qkv and attention together: what passes between them is the cache, which only they see.

import { describe, expect, it } from 'vitest';
import type { Dtype } from '../../src/native.js';
import { batchOf, DTYPES, type OpBenches, type OpPlan, openOps, step, TOKENS } from '../helpers/op.js';
import { Agreement } from '../helpers/op-agreement.js';
import { freshRandom } from '../helpers/op-random.js';
import {
  attention,
  type CacheEntry,
  type Heads,
  norm,
  type QkvWeights,
  qkv,
  rounding,
  rowsOf,
} from '../helpers/reference.js';

const random = freshRandom();
const EPS = 1e-6;

interface Shape extends Heads {
  hidden: number;
  kEqV?: boolean;
}

const shape = (
  hidden: number,
  headDim: number,
  heads: number,
  kvHeads: number,
  more: Partial<Shape> = {},
): Shape => ({
  hidden,
  headDim,
  heads,
  kvHeads,
  window: 0,
  rotaryPairs: headDim / 2,
  ropeTheta: 10000,
  ...more,
});

function planOf(s: Shape, limits: OpPlan['limits'] = {}): OpPlan {
  // Norms that give scores a deviation of about 3, as real models have.
  const spread = Math.sqrt(3 / Math.sqrt(s.headDim));
  const width = s.heads * s.headDim;
  const kvWidth = s.kvHeads * s.headDim;
  const deviation = 1 / Math.sqrt(s.hidden);
  return {
    model: { hidden: s.hidden, eps: EPS },
    layer: { ...s, kEqV: s.kEqV ?? false },
    limits,
    steps: [step('qkv', 'norm', 'q', 'k', ...(s.kEqV ? [] : ['v']), 'qNorm', 'kNorm'), step('attention')],
    weights: {
      norm: { shape: [s.hidden], deviation: 0.2, offset: 1 },
      q: { shape: [width, s.hidden], deviation },
      k: { shape: [kvWidth, s.hidden], deviation },
      ...(s.kEqV ? {} : { v: { shape: [kvWidth, s.hidden], deviation } }),
      qNorm: { shape: [s.headDim], deviation: 0.1 * spread, offset: spread },
      kNorm: { shape: [s.headDim], deviation: 0.1 * spread, offset: spread },
    },
  };
}

/** A step's tokens: `count` of one slot, from `position` on. */
interface Chunk {
  slot: number;
  position: number;
  count: number;
}

/** Steps of chunks through both, against the reference that keeps every position for ever. */
class Conversation {
  readonly normed: Agreement;
  readonly q: Agreement;
  readonly attention: Agreement;
  private readonly cache: CacheEntry[][][]; // [bench][slot][position]

  constructor(
    private readonly ops: OpBenches,
    private readonly shape: Shape,
    private readonly dtype: Dtype,
  ) {
    this.normed = Agreement.of(dtype);
    this.q = Agreement.of(dtype);
    // A key in the cache that was rounded the other way shifts every later score a little.
    this.attention = Agreement.of(dtype, 4, 0, 0.9);
    this.cache = ops.benches.map(() => [[], []]);
  }

  async step(chunks: readonly Chunk[]) {
    const { ops, shape: s, dtype } = this;
    const tokens = chunks.flatMap(({ slot, position, count }) =>
      Array.from({ length: count }, (_, i) => ({ slot, position: position + i })),
    );
    const batch = batchOf({ positions: tokens.map((t) => t.position), slots: tokens.map((t) => t.slot) });
    const hidden = random.values(tokens.length * s.hidden, dtype, 2);
    const r = rounding(dtype);
    const w: QkvWeights = {
      q: ops.weights.q!,
      k: ops.weights.k!,
      v: s.kEqV ? null : ops.weights.v!,
      qNorm: ops.weights.qNorm![0]!,
      kNorm: ops.weights.kNorm![0]!,
    };
    const normed = rowsOf(hidden, s.hidden).map((x) => norm(x, ops.weights.norm![0]!, EPS, r));
    for (const [b, bench] of ops.benches.entries()) {
      const where = (what: string) => `${what} of ${tokens.length} tokens on ${bench.name}`;
      const got = await bench.run(batch, [{ hidden }], ['normed', 'q', 'attention']);
      this.normed.add(got.normed!, normed, where('normed'));
      // Each stage is held to what the stage before it really gave, so that no difference is counted twice.
      const mine = rowsOf(got.normed!, s.hidden).map((a, t) => qkv(a, tokens[t]!.position, w, s, EPS, r));
      this.q.add(
        got.q!,
        mine.map(({ q }) => Float64Array.from(q.flatMap((head) => [...head]))),
        where('q'),
      );
      for (const [t, { slot, position }] of tokens.entries())
        this.cache[b]![slot]![position] = mine[t]!.entry;
      const queries = rowsOf(got.q!, s.heads * s.headDim);
      const want = tokens.map(({ slot, position }, t) =>
        attention(rowsOf(queries[t]!, s.headDim), this.cache[b]![slot]!.slice(0, position + 1), s, r),
      );
      this.attention.add(got.attention!, want, where('attention'));
    }
  }

  finish() {
    this.normed.finish();
    this.q.finish();
    this.attention.finish();
    this.ops.close();
  }
}

async function converse(
  s: Shape,
  dtype: Dtype,
  steps: readonly (readonly Chunk[])[],
  limits?: OpPlan['limits'],
) {
  const conversation = new Conversation(await openOps(planOf(s, limits), dtype, random), s, dtype);
  for (const chunks of steps) await conversation.step(chunks);
  conversation.finish();
}

describe.each(DTYPES)('qkv and attention in %s', (dtype) => {
  it.each([
    ['heads of 16', shape(10, 16, 4, 2)],
    ['heads of 32, partial rotary', shape(48, 32, 2, 1, { rotaryPairs: 4, ropeTheta: 1e6 })],
    ['heads of 256', shape(33, 256, 2, 1)],
    [
      'heads of 512, K = V, partial rotary',
      shape(17, 512, 2, 1, { kEqV: true, rotaryPairs: 64, ropeTheta: 1e6 }),
    ],
    ['heads of 4', shape(8, 4, 8, 8)],
    ['heads of 6, no rotary', shape(12, 6, 3, 1, { rotaryPairs: 0 })],
    ['a query and a KV head', shape(100, 32, 1, 1, { window: 16 })],
    ['eight queries a KV head', shape(16, 16, 8, 1, { kEqV: true })],
  ] as const)('follow the reference for %s', async (_, s) => {
    let position = 0;
    const steps = TOKENS.map((count) => {
      const chunk = { slot: 0, position, count };
      position += count;
      return [chunk];
    });
    await converse(s, dtype, steps);
  });

  it('see a window that is smaller than the chunk', async () => {
    await converse(shape(24, 16, 4, 2, { window: 5 }), dtype, [
      [{ slot: 0, position: 0, count: 64 }],
      [{ slot: 0, position: 64, count: 64 }],
      [{ slot: 0, position: 128, count: 1 }],
    ]);
  });

  it('see their own position alone through a window of 1', async () => {
    await converse(shape(16, 16, 2, 1, { window: 1 }), dtype, [
      [{ slot: 0, position: 0, count: 3 }],
      [{ slot: 0, position: 3, count: 1 }],
    ]);
  });

  it('follow the reference while the ring goes round many times', async () => {
    const s = shape(16, 16, 2, 2, { window: 7 });
    const steps: Chunk[][] = [];
    const counts = [8, 1, 3, 8, 8, 2, 5];
    for (let position = 0, i = 0; position + 8 <= 150; i++) {
      const count = counts[i % counts.length]!;
      steps.push([{ slot: 0, position, count }]);
      position += count;
    }
    // A ring of 7 + 8 - 1 positions.
    await converse(s, dtype, steps, { tokens: 8, positions: 150 });
  });

  it('keep the sequences of a step apart', async () => {
    const s = shape(20, 16, 4, 1, { window: 6 });
    await converse(s, dtype, [
      [
        { slot: 1, position: 0, count: 9 },
        { slot: 0, position: 0, count: 4 },
      ],
      [
        { slot: 0, position: 4, count: 1 },
        { slot: 1, position: 9, count: 1 },
      ],
      [{ slot: 1, position: 10, count: 12 }],
      [
        { slot: 1, position: 22, count: 2 },
        { slot: 0, position: 5, count: 7 },
      ],
    ]);
  });

  it('start a slot again at position 0 without a trace of the sequence before', async () => {
    const s = shape(20, 16, 4, 1, { window: 6 });
    const { benches, close } = await openOps(planOf(s), dtype, random);
    const batch = batchOf({ positions: [0, 1, 2, 3, 4] });
    const first = random.values(5 * s.hidden, dtype);
    for (const bench of benches) {
      const fresh = await bench.run(batch, [{ hidden: first }], ['attention']);
      const other = random.values(5 * s.hidden, dtype);
      await bench.run(batchOf({ positions: [5, 6, 7, 8, 9] }), [{ hidden: other }], ['attention']);
      const again = await bench.run(batch, [{ hidden: first }], ['attention']);
      expect(again).toEqual(fresh);
    }
    close();
  });
});
