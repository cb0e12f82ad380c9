import { describe, it } from 'vitest';
import { batchOf, DTYPES, type OpPlan, openOps, step, TOKENS } from '../helpers/op.js';
import { Agreement } from '../helpers/op-agreement.js';
import { freshRandom } from '../helpers/op-random.js';
import { ffnOut, rounding, rowsOf } from '../helpers/reference.js';

const random = freshRandom();
const EPS = 1e-6;

describe.each([8, 33, 100, 2816])('ffnOut of %i', (hidden) => {
  it.each(DTYPES)('joins both sums and the residual in %s', async (dtype) => {
    const norm = { shape: [hidden], deviation: 0.3, offset: 1 };
    const plan: OpPlan = {
      model: { hidden, eps: EPS },
      steps: [step('ffnOut', 'denseNorm', 'expertNorm', 'norm', 'layerScalar')],
      weights: {
        denseNorm: norm,
        expertNorm: norm,
        norm,
        layerScalar: { shape: [1], deviation: 0.1, offset: 1 },
      },
    };
    const { benches, weights, close } = await openOps(plan, dtype, random);
    const w = {
      denseNorm: weights.denseNorm![0]!,
      expertNorm: weights.expertNorm![0]!,
      norm: weights.norm![0]!,
      layerScalar: weights.layerScalar![0]![0]!,
    };
    const agreement = Agreement.of(dtype, 2);
    for (const tokens of TOKENS) {
      const ffnSum = random.values(tokens * 2 * hidden, 'float32', 3);
      const residual = random.values(tokens * hidden, dtype, 2);
      const sums = rowsOf(ffnSum, hidden);
      const want = rowsOf(residual, hidden).map((m, t) =>
        ffnOut(sums[2 * t]!, sums[2 * t + 1]!, m, w, EPS, rounding(dtype)),
      );
      for (const bench of benches) {
        const batch = batchOf({ positions: Array(tokens).fill(0) });
        const got = await bench.run(batch, [{ ffnSum, hidden: residual }], ['hidden']);
        agreement.add(got.hidden!, want, `${tokens} tokens on ${bench.name}`);
      }
    }
    agreement.finish();
    close();
  });
});
