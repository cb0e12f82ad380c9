import { describe, it } from 'vitest';
import {
  batchOf,
  DTYPES,
  type OpPlan,
  openOps,
  PAUSE,
  routeStep,
  routeWeights,
  step,
  TOKENS,
} from '../helpers/op.js';
import { Agreement } from '../helpers/op-agreement.js';
import { freshRandom } from '../helpers/op-random.js';
import { rowsOf, times } from '../helpers/reference.js';

const random = freshRandom();

describe.each([
  { hidden: 10, inter: 16, width: 16, experts: 1, topK: 1, leaves: 8, rank: 0, size: 1 },
  { hidden: 33, inter: 24, width: 8, experts: 5, topK: 3, leaves: 4, rank: 0, size: 1 },
  { hidden: 35, inter: 33, width: 7, experts: 16, topK: 4, leaves: 1, rank: 0, size: 1 },
  { hidden: 48, inter: 264, width: 88, experts: 128, topK: 8, leaves: 8, rank: 1, size: 2 },
  { hidden: 64, inter: 6, width: 22, experts: 8, topK: 8, leaves: 8, rank: 3, size: 8 },
])(
  'down of $inter and of $topK of $experts experts of $width, rank $rank of $size with $leaves leaves',
  (shape) => {
    const { hidden, inter, width, experts, topK, leaves, rank, size } = shape;

    it.each(DTYPES)('gives both unrounded sums of this rank in %s', async (dtype) => {
      const plan: OpPlan = {
        model: { hidden, intermediate: inter, moeIntermediate: width, experts, topK, leaves },
        rank,
        size,
        steps: [routeStep, PAUSE, step('down', 'down', 'expertDown')],
        weights: {
          ...routeWeights(hidden, experts),
          down: { shape: [hidden, inter], deviation: 1 / Math.sqrt(inter) },
          expertDown: { shape: [experts, hidden, width], deviation: 1 / Math.sqrt(width) },
        },
      };
      const { benches, weights, close } = await openOps(plan, dtype, random);
      const agreement = new Agreement(false);
      const expert = (e: number) => weights.expertDown!.slice(e * hidden, (e + 1) * hidden);
      for (const tokens of TOKENS) {
        const before = {
          attnSum: random.values(tokens * hidden, 'float32'),
          hidden: random.values(tokens * hidden, dtype),
        };
        const inputs = {
          denseAct: random.values(tokens * inter, dtype),
          expertAct: random.values(tokens * topK * width, dtype),
        };
        const dense = rowsOf(inputs.denseAct, inter);
        const acts = rowsOf(inputs.expertAct, width);
        for (const bench of benches) {
          const outputs = ['routeIndex', 'routeWeight', 'ffnSum'];
          const batch = batchOf({ positions: Array(tokens).fill(0) });
          const got = await bench.run(batch, [before, inputs], outputs);
          const want = dense.flatMap((x, t) => {
            const sum = new Float64Array(hidden);
            for (let k = t * topK; k < (t + 1) * topK; k++)
              for (const [i, y] of times(expert(got.routeIndex![k]!), acts[k]!).entries())
                sum[i]! += got.routeWeight![k]! * y;
            return [times(weights.down!, x), sum];
          });
          agreement.add(got.ffnSum!, want, `${tokens} tokens on ${bench.name}`);
        }
      }
      agreement.finish();
      close();
    });
  },
);
