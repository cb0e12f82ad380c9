import { describe, it } from 'vitest';
import { batchOf, DTYPES, type OpPlan, openOps, step, TOKENS } from '../helpers/op.js';
import { Agreement } from '../helpers/op-agreement.js';
import { freshRandom } from '../helpers/op-random.js';
import { rowsOf, times } from '../helpers/reference.js';

const random = freshRandom();

describe.each([
  { hidden: 10, heads: 8, headDim: 2, leaves: 8, rank: 0, size: 1 },
  { hidden: 33, heads: 4, headDim: 6, leaves: 4, rank: 0, size: 1 },
  { hidden: 100, heads: 3, headDim: 16, leaves: 1, rank: 0, size: 1 },
  { hidden: 48, heads: 2, headDim: 512, leaves: 4, rank: 1, size: 2 },
  { hidden: 64, heads: 1, headDim: 32, leaves: 8, rank: 7, size: 8 },
])('attnOut of $heads heads of $headDim into $hidden, rank $rank of $size with $leaves leaves', (shape) => {
  const { hidden, heads, headDim, leaves, rank, size } = shape;
  const width = heads * headDim;

  it.each(DTYPES)('is the unrounded sum over this rank alone in %s', async (dtype) => {
    const plan: OpPlan = {
      model: { hidden, leaves },
      layer: { heads, headDim },
      rank,
      size,
      steps: [step('attnOut', 'o')],
      weights: { o: { shape: [hidden, width], deviation: 1 / Math.sqrt(width) } },
    };
    const { benches, weights, close } = await openOps(plan, dtype, random);
    const agreement = new Agreement(false);
    for (const tokens of TOKENS) {
      const attention = random.values(tokens * width, dtype);
      const want = rowsOf(attention, width).map((x) => times(weights.o!, x));
      for (const bench of benches) {
        const batch = batchOf({ positions: Array(tokens).fill(0) });
        const got = await bench.run(batch, [{ attention }], ['attnSum']);
        agreement.add(got.attnSum!, want, `${tokens} tokens on ${bench.name}`);
      }
    }
    agreement.finish();
    close();
  });
});
