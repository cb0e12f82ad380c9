import { describe, expect, it } from 'vitest';
import type { Dtype } from '../../src/native.js';
import { batchOf, DTYPES, type OpPlan, openOps, routeStep, routeWeights, TOKENS } from '../helpers/op.js';
import { Agreement } from '../helpers/op-agreement.js';
import { freshRandom } from '../helpers/op-random.js';
import { choose, rounding, routeInputs, rowsOf, times } from '../helpers/reference.js';

const random = freshRandom();
const EPS = 1e-6;
const OUTPUTS = ['hidden', 'denseIn', 'expertIn', 'normed', 'routeIndex', 'routeWeight'];

const planOf = (hidden: number, experts: number, topK: number): OpPlan => ({
  model: { hidden, experts, topK, eps: EPS },
  steps: [routeStep],
  weights: routeWeights(hidden, experts),
});

const inputsOf = (tokens: number, hidden: number, dtype: Dtype) => ({
  attnSum: random.values(tokens * hidden, 'float32', 1.5),
  hidden: random.values(tokens * hidden, dtype, 2),
});

describe.each([
  { hidden: 10, experts: 1, topK: 1 },
  { hidden: 33, experts: 5, topK: 2 },
  { hidden: 64, experts: 16, topK: 4 },
  { hidden: 100, experts: 33, topK: 8 },
  { hidden: 48, experts: 128, topK: 8 },
  { hidden: 16, experts: 8, topK: 8 },
])('route of $hidden to $topK of $experts experts', ({ hidden, experts, topK }) => {
  it.each(DTYPES)('follows the reference in %s', async (dtype) => {
    const { benches, weights, close } = await openOps(planOf(hidden, experts, topK), dtype, random);
    const r = rounding(dtype);
    const norms = {
      postAttentionNorm: weights.postAttentionNorm![0]!,
      denseNorm: weights.denseNorm![0]!,
      expertNorm: weights.expertNorm![0]!,
      scale: weights.scale![0]!,
    };
    const streams = Agreement.of(dtype, 2);
    const routing = new Agreement(false);
    for (const tokens of TOKENS) {
      const inputs = inputsOf(tokens, hidden, dtype);
      const residuals = rowsOf(inputs.hidden, hidden);
      const want = rowsOf(inputs.attnSum, hidden).map((sum, t) =>
        routeInputs(sum, residuals[t]!, norms, EPS, r),
      );
      for (const bench of benches) {
        const where = `${tokens} tokens on ${bench.name}`;
        const got = await bench.run(batchOf({ positions: Array(tokens).fill(0) }), [inputs], OUTPUTS);
        streams.add(
          got.hidden!,
          want.map((w) => w.hidden),
          `hidden, ${where}`,
        );
        streams.add(
          got.denseIn!,
          want.map((w) => w.denseIn),
          `denseIn, ${where}`,
        );
        streams.add(
          got.expertIn!,
          want.map((w) => w.expertIn),
          `expertIn, ${where}`,
        );
        streams.add(
          got.normed!,
          want.map((w) => w.z),
          `router input, ${where}`,
        );
        // The choice is held to the router input that the op really had.
        const found = rowsOf(got.routeIndex!, topK);
        const chosen = rowsOf(got.normed!, hidden).map((z) =>
          choose(times(weights.router!, z), weights.perExpertScale![0]!, topK),
        );
        for (const [t, { index, probability }] of chosen.entries()) {
          expect(new Set(found[t]).size, `distinct experts of token ${t}, ${where}`).toBe(topK);
          for (const [k, expert] of index.entries()) {
            // Another expert only when their probabilities differ by less than single precision tells apart.
            const other = found[t]![k]!;
            if (other !== expert)
              expect(probability[other]! / probability[expert]!, `choice ${k}, ${where}`).toBeCloseTo(1, 5);
          }
        }
        routing.add(
          got.routeWeight!,
          chosen.map(({ probability }, t) => {
            const total = found[t]!.reduce((sum, e) => sum + probability[e]!, 0);
            return found[t]!.map((e) => (probability[e]! / total) * weights.perExpertScale![0]![e]!);
          }),
          `routeWeight, ${where}`,
        );
      }
    }
    streams.finish();
    routing.finish();
    close();
  });
});

describe.each(DTYPES)('equal experts in %s', (dtype) => {
  const hidden = 20;
  const tokens = 17;

  async function choices(
    experts: number,
    topK: number,
    router: Float32Array,
  ): Promise<Map<string, number[][]>> {
    const plan = planOf(hidden, experts, topK);
    const tied = {
      ...plan,
      weights: { ...plan.weights, router: { shape: [experts, hidden], values: router } },
    };
    const { benches, close } = await openOps(tied, dtype, random);
    const inputs = inputsOf(tokens, hidden, dtype);
    const out = new Map<string, number[][]>();
    for (const bench of benches) {
      const got = await bench.run(batchOf({ positions: Array(tokens).fill(0) }), [inputs], OUTPUTS);
      out.set(
        bench.name,
        rowsOf(got.routeIndex!, topK).map((row) => [...row]),
      );
    }
    close();
    return out;
  }

  it('are chosen by the lower id when all are equal', async () => {
    for (const [name, rows] of await choices(100, 8, new Float32Array(100 * hidden)))
      for (const row of rows) expect(row, name).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
  });

  it('come in pairs, the lower id first, when every expert has a twin', async () => {
    const half = random.values(24 * hidden, 'bfloat16', 0.3);
    for (const [name, rows] of await choices(48, 6, Float32Array.of(...half, ...half)))
      for (const row of rows) for (const k of [0, 2, 4]) expect(row[k + 1], name).toBe(row[k]! + 24);
  });
});
