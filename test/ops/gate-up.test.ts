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
import { gated, rounding, rowsOf } from '../helpers/reference.js';

const random = freshRandom();

describe.each([
  { hidden: 8, inter: 8, width: 8, experts: 1, topK: 1 },
  { hidden: 33, inter: 40, width: 6, experts: 5, topK: 3 },
  { hidden: 100, inter: 33, width: 35, experts: 16, topK: 4 },
  { hidden: 48, inter: 2, width: 2, experts: 128, topK: 8 },
])('gateUp of $inter and of $topK of $experts experts of $width', (shape) => {
  const { hidden, inter, width, experts, topK } = shape;

  it.each(DTYPES)('gates the dense MLP and each chosen expert in %s', async (dtype) => {
    const deviation = 1 / Math.sqrt(hidden);
    const plan: OpPlan = {
      model: { hidden, intermediate: inter, moeIntermediate: width, experts, topK },
      steps: [routeStep, PAUSE, step('gateUp', 'gate', 'up', 'expertGateUp')],
      weights: {
        ...routeWeights(hidden, experts),
        gate: { shape: [inter, hidden], deviation },
        up: { shape: [inter, hidden], deviation },
        expertGateUp: { shape: [experts, 2 * width, hidden], deviation },
      },
    };
    const { benches, weights, close } = await openOps(plan, dtype, random);
    const r = rounding(dtype);
    // Far below 0 GELU is nearly flat: its error there is that of its argument, which has deviation 2.
    const agreement = Agreement.of(dtype, 2, 4);
    const half = (expert: number, which: number) => {
      const first = (2 * expert + which) * width;
      return weights.expertGateUp!.slice(first, first + width);
    };
    for (const tokens of TOKENS) {
      const before = {
        attnSum: random.values(tokens * hidden, 'float32'),
        hidden: random.values(tokens * hidden, dtype),
      };
      // Some gates far from 0, on both sides.
      const inputs = {
        denseIn: random.values(tokens * hidden, dtype, 2),
        expertIn: random.values(tokens * hidden, dtype, 2),
      };
      const dense = rowsOf(inputs.denseIn, hidden).map((x) => gated(x, weights.gate!, weights.up!, r));
      const expertIn = rowsOf(inputs.expertIn, hidden);
      for (const bench of benches) {
        const where = `${tokens} tokens on ${bench.name}`;
        const outputs = ['routeIndex', 'denseAct', 'expertAct'];
        const batch = batchOf({ positions: Array(tokens).fill(0) });
        const got = await bench.run(batch, [before, inputs], outputs);
        agreement.add(got.denseAct!, dense, `dense, ${where}`);
        const chosen = rowsOf(got.routeIndex!, topK);
        const want = chosen.flatMap((ids, t) =>
          [...ids].map((e) => gated(expertIn[t]!, half(e, 0), half(e, 1), r)),
        );
        agreement.add(got.expertAct!, want, `experts, ${where}`);
      }
    }
    agreement.finish();
    close();
  });
});
