import { describe, expect, it } from 'vitest';
import { batchOf, DTYPES, type OpPlan, openOps, step, TOKENS } from '../helpers/op.js';
import { freshRandom } from '../helpers/op-random.js';
import { rounding } from '../helpers/reference.js';

const random = freshRandom();

describe.each([
  { hidden: 8, vocab: 8 },
  { hidden: 33, vocab: 40 },
  { hidden: 100, vocab: 256 },
])('embed of $vocab tokens into $hidden', ({ hidden, vocab }) => {
  it.each(DTYPES)('is the row of the table times the scale, rounded once, in %s', async (dtype) => {
    const scale = Math.fround(Math.sqrt(hidden));
    const plan: OpPlan = {
      model: { hidden, vocab, embedScale: scale },
      steps: [{ ...step('embed', 'table'), layer: -1 }],
      weights: { table: { shape: [vocab, hidden], deviation: 0.3 } },
    };
    const { benches, weights, close } = await openOps(plan, dtype, random);
    const r = rounding(dtype);
    for (const count of TOKENS) {
      const tokens = Array.from({ length: count }, (_, t) => (t === 0 ? vocab - 1 : random.below(vocab)));
      // One product of two exact values: nothing may differ.
      const want = tokens.flatMap((id) => [...weights.table![id]!].map((x) => r(Math.fround(x * r(scale)))));
      for (const bench of benches) {
        const { hidden: got } = await bench.run(
          batchOf({ tokens, positions: tokens.map((_, t) => t) }),
          [{}],
          ['hidden'],
        );
        expect([...got!], `${count} tokens on ${bench.name}`).toEqual(want);
      }
    }
    close();
  });
});
