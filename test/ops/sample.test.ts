// The sampler alone: what every rank would gather is written by hand from whole rows of logits.

import { describe, expect, it } from 'vitest';
import { batchOf, type OpBench, type OpPlan, openOps, step } from '../helpers/op.js';
import { freshRandom } from '../helpers/op-random.js';
import { kept, logProbabilities, ranking, type SamplingRow, scores } from '../helpers/reference-sampling.js';

const random = freshRandom();
const NO_TOKEN = 2 ** 24;

interface Shape {
  vocab: number;
  leaves: number;
  size: number;
  candidates: number;
}

const planOf = ({ vocab, leaves, size, candidates }: Shape): OpPlan => ({
  model: { vocab, leaves },
  rank: size - 1,
  size,
  limits: { candidates },
  steps: [
    { op: 'allGather', stage: 'logits', layer: -1, weights: {}, buffer: 'candidates' },
    { ...step('sample'), layer: -1 },
  ],
  weights: {},
});

interface Row extends SamplingRow {
  logits: Float32Array;
  target: number;
}

/** What a leaf says of one row: maximum, sum of powers, target's logit, then its best tokens (score, logit, id). */
function summary(row: Row, first: number, leaf: number, candidates: number): number[] {
  const mine = row.logits.subarray(first, first + leaf);
  const max = Math.max(...mine);
  const target = row.target >= first && row.target < first + leaf ? row.logits[row.target]! : -Infinity;
  const perturbed = row.temperature > 0 && row.topK === 0 && row.topP >= 1;
  const score = perturbed ? scores(row.logits, row) : null;
  const of = (id: number) => score?.get(id) ?? row.logits[id]!;
  const ids = Array.from(mine, (_, i) => first + i).sort((a, b) => of(b) - of(a) || a - b);
  const list = Array.from({ length: candidates }, (_, c) =>
    c < leaf ? [of(ids[c]!), row.logits[ids[c]!]!, ids[c]!] : [-Infinity, -Infinity, NO_TOKEN],
  );
  return [max, mine.reduce((sum, x) => sum + Math.exp(x - max), 0), target, ...list.flat()];
}

/** Runs the sampler on rows, as if `size` ranks had gathered them. */
async function sample({ engine }: OpBench, rows: readonly Row[], { vocab, leaves, size, candidates }: Shape) {
  engine.begin(
    batchOf({
      positions: rows.map((r) => r.position),
      rows: rows.map((_, r) => r),
      targets: rows.map((r) => r.target),
      sampling: rows,
    }),
  );
  const leaf = vocab / leaves;
  const all = Array.from({ length: size }, (_, rank) =>
    rows.map((row) =>
      Array.from({ length: leaves / size }, (_, l) =>
        summary(row, (rank * (leaves / size) + l) * leaf, leaf, candidates),
      ),
    ),
  );
  const { gathered } = engine.syncBuffers(await engine.run(0));
  gathered!.set(all.flat(3));
  await engine.run(1);
  return engine.result();
}

const rowOf = (logits: Float32Array, more: Partial<Row> = {}): Row => ({
  logits,
  temperature: 0,
  topK: 0,
  topP: 1,
  seed: random.bits(),
  sequence: random.below(1000),
  position: random.below(200),
  target: -1,
  ...more,
});

async function onEach(shape: Shape, work: (bench: OpBench) => Promise<void>) {
  const { benches, close } = await openOps(planOf(shape), 'bfloat16', random);
  for (const bench of benches) await work(bench);
  close();
}

const shapes: Shape[] = [
  { vocab: 16, leaves: 8, size: 1, candidates: 2 },
  { vocab: 240, leaves: 4, size: 2, candidates: 60 },
  { vocab: 331, leaves: 1, size: 1, candidates: 400 },
  { vocab: 512, leaves: 8, size: 8, candidates: 64 },
];

describe.each(shapes)('sample of $vocab tokens gathered from $size ranks with $leaves leaves', (shape) => {
  const logits = () => random.values(shape.vocab, 'float32', 4);
  const leaf = shape.vocab / shape.leaves;

  it('takes the best token when greedy, and tells its log-probability and the target’s', async () => {
    const rows = Array.from({ length: 20 }, (_, i) =>
      rowOf(logits(), { target: i % 5 === 4 ? -1 : random.below(shape.vocab) }),
    );
    await onEach(shape, async (bench) => {
      const { tokens, logprobs, targetLogprobs } = await sample(bench, rows, shape);
      for (const [r, row] of rows.entries()) {
        const best = ranking(row.logits)[0]!;
        const want = logProbabilities(row.logits);
        expect(tokens[r], bench.name).toBe(best);
        expect(Math.abs(logprobs[r]! - want[best]!), bench.name).toBeLessThan(1e-5);
        if (row.target < 0) expect(targetLogprobs[r], bench.name).toBeNaN();
        else expect(Math.abs(targetLogprobs[r]! - want[row.target]!), bench.name).toBeLessThan(1e-5);
      }
    });
  });

  it.each([
    { temperature: 1, topK: 0, topP: 1 },
    { temperature: 0.25, topK: 0, topP: 1 },
    { temperature: 1.5, topK: 1, topP: 1 },
    { temperature: 1.5, topK: 7, topP: 1 },
    { temperature: 1, topK: 0, topP: 0.8 },
    { temperature: 2, topK: 0, topP: 0.999 },
    { temperature: 0.8, topK: 9, topP: 0.5 },
    { temperature: 1, topK: 0, topP: 1e-9 },
  ])('takes the best perturbed token at $temperature of top-k $topK, top-p $topP', async (filter) => {
    // A rank's list must be able to hold what the filter asks for.
    const possible = { ...filter, topK: Math.min(filter.topK, shape.candidates) };
    if (possible.topP < 1 && possible.topK === 0 && shape.candidates < leaf) throw new Error('bad shape');
    const rows = Array.from({ length: 64 }, () => rowOf(logits(), possible));
    await onEach(shape, async (bench) => {
      const { tokens, logprobs } = await sample(bench, rows, shape);
      for (const [r, row] of rows.entries()) {
        const score = scores(row.logits, row);
        const best = Math.max(...score.values());
        const token = tokens[r]!;
        // The winner, or one that single precision cannot tell from it.
        expect(score.get(token), `token ${token} of row ${r} on ${bench.name}`).toBeGreaterThan(best - 1e-4);
        const wanted = logProbabilities(row.logits)[token]!;
        expect(Math.abs(logprobs[r]! - wanted), bench.name).toBeLessThan(1e-5);
      }
    });
  });

  it('keeps the smallest prefix that reaches top-p, and no fewer', async () => {
    // Probabilities 1/2, 1/4, 1/8, ...: after k tokens the mass is 1 - 2^-k.
    const order = ranking(logits());
    const row = new Float32Array(shape.vocab);
    for (const [place, id] of order.entries()) row[id] = -Math.LN2 * Math.min(place, 60);
    for (const [topP, count] of [
      [0.3, 1],
      [0.6, 2],
      [0.76, 3],
      [0.99, 7],
    ] as const) {
      const rows = Array.from({ length: 64 }, (_, sequence) =>
        rowOf(row, { temperature: 1, topP, sequence }),
      );
      expect(kept(row, rows[0]!)).toEqual(order.slice(0, count));
      await onEach(shape, async (bench) => {
        const { tokens } = await sample(bench, rows, shape);
        const seen = new Set(tokens);
        for (const token of seen) expect(order.indexOf(token), bench.name).toBeLessThan(count);
        if (count <= 3) expect(seen.size, bench.name).toBe(count);
      });
    }
  });

  it('prefers the lower id among equals, wherever their leaves are', async () => {
    const tied = new Float32Array(shape.vocab).fill(-3);
    const [low, middle, high] = [1, leaf, shape.vocab - 1] as const;
    const ids = shape.leaves > 1 ? [low, middle, high] : [low, high];
    for (const id of ids) tied[id] = 2;
    const level = new Float32Array(shape.vocab).fill(0.5);
    const rows = [
      rowOf(tied),
      rowOf(level),
      rowOf(tied, { temperature: 1, topK: 1 }),
      rowOf(level, { temperature: 1, topK: 1 }),
      rowOf(level, { temperature: 1, topP: 1e-9 }),
    ];
    await onEach(shape, async (bench) => {
      expect([...(await sample(bench, rows, shape)).tokens], bench.name).toEqual([low, 0, low, 0, 0]);
    });
  });
});
