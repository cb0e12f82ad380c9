import { describe, expect, it } from 'vitest';
import { batchOf, DTYPES, type OpPlan, openOps, step, TOKENS } from '../helpers/op.js';
import { Agreement } from '../helpers/op-agreement.js';
import { freshRandom } from '../helpers/op-random.js';
import { logits, norm, rounding, rowsOf } from '../helpers/reference.js';
import { ranking, type SamplingRow, scores } from '../helpers/reference-sampling.js';

const random = freshRandom();
const EPS = 1e-6;
const NO_TOKEN = 2 ** 24;

interface Shape {
  hidden: number;
  vocab: number; // of the whole model
  softcap: number;
  leaves: number;
  candidates: number;
  rank: number;
  size: number;
}

const planOf = (s: Shape, table?: Float32Array): OpPlan => ({
  model: { hidden: s.hidden, vocab: s.vocab, softcap: s.softcap, leaves: s.leaves, eps: EPS },
  limits: { candidates: s.candidates },
  rank: s.rank,
  size: s.size,
  steps: [
    { ...step('logits', 'norm', 'table'), layer: -1 },
    { op: 'allGather', stage: 'logits', layer: -1, weights: {}, buffer: 'candidates' },
  ],
  weights: {
    norm: { shape: [s.hidden], deviation: 0.3, offset: 1 },
    table: {
      shape: [s.vocab, s.hidden],
      deviation: 3 / Math.sqrt(s.hidden),
      ...(table && { values: table }),
    },
  },
});

describe.each<Shape>([
  { hidden: 8, vocab: 16, softcap: 30, leaves: 8, candidates: 1, rank: 0, size: 1 },
  { hidden: 33, vocab: 200, softcap: 2, leaves: 4, candidates: 60, rank: 0, size: 1 },
  { hidden: 100, vocab: 333, softcap: 0, leaves: 1, candidates: 5, rank: 0, size: 1 },
  { hidden: 64, vocab: 512, softcap: 30, leaves: 8, candidates: 3, rank: 1, size: 4 },
])('logits of $vocab tokens, softcap $softcap, rank $rank of $size', (shape) => {
  const { hidden, vocab, softcap, leaves, candidates, rank, size } = shape;
  const local = vocab / size;
  const leaf = vocab / leaves;

  it.each(DTYPES)('are the capped products with the rows asked for in %s', async (dtype) => {
    const { benches, weights, close } = await openOps(planOf(shape), dtype, random);
    const table = weights.table!.slice(rank * local, (rank + 1) * local);
    const normed = Agreement.of(dtype);
    const capped = new Agreement(false);
    for (const tokens of TOKENS) {
      const state = random.values(tokens * hidden, dtype, 2);
      // In any order, some twice, some never.
      const rows = Array.from({ length: tokens }, () => random.below(tokens));
      const states = rowsOf(state, hidden);
      const want = rows.map((t) => norm(states[t]!, weights.norm![0]!, EPS, rounding(dtype)));
      for (const bench of benches) {
        const where = `${tokens} tokens on ${bench.name}`;
        const batch = batchOf({ positions: Array(tokens).fill(0), rows });
        const got = await bench.run(batch, [{ hidden: state }], ['normed', 'logits']);
        normed.add(got.normed!, want, `normed, ${where}`);
        const found = rowsOf(got.normed!, hidden).map((x) => logits(x, table, softcap));
        capped.add(got.logits!, found, `logits, ${where}`);
      }
    }
    normed.finish();
    capped.finish();
    close();
  });

  it.each(DTYPES)('tell the sampler of every leaf what it needs in %s', async (dtype) => {
    const { benches, close } = await openOps(planOf(shape), dtype, random);
    // Greedy, perturbed, and to be filtered: each of the three kinds of row.
    const kinds = [
      { temperature: 0, topK: 0, topP: 1 },
      { temperature: 0.7, topK: 0, topP: 1 },
      { temperature: 1.3, topK: Math.min(candidates, leaf), topP: 1 },
    ];
    const sampling = Array.from({ length: 12 }, (_, i) => ({
      ...kinds[i % 3]!,
      seed: random.bits(),
      sequence: random.below(100),
    }));
    const positions = sampling.map(() => random.below(200));
    const targets = sampling.map((_, i) => (i % 4 === 3 ? -1 : random.below(vocab)));
    const batch = batchOf({ positions, rows: positions.map((_, t) => t), targets, sampling });
    const state = random.values(positions.length * hidden, dtype, 2);
    for (const { name, engine } of benches) {
      engine.begin(batch);
      engine.writeBuffer('hidden', state);
      const sync = await engine.run(0);
      const { send } = engine.syncBuffers(sync);
      const summaries = rowsOf(send, send.length / (positions.length * (leaves / size)));
      expect(summaries[0]).toHaveLength(3 + 3 * candidates);
      const rowLogits = rowsOf(engine.logits(), local);
      for (const [i, [max, sum, target, ...list]] of summaries.map((s) => [...s]).entries()) {
        const row = Math.floor(i / (leaves / size));
        const first = (i % (leaves / size)) * leaf; // of this rank's logits
        const where = `row ${row}, leaf ${first / leaf} on ${name}`;
        const mine = rowLogits[row]!.subarray(first, first + leaf);
        expect(max, where).toBe(Math.max(...mine));
        const powers = mine.reduce((all, x) => all + Math.exp(x - max!), 0);
        expect(sum! / powers, where).toBeCloseTo(1, 5);
        const id = targets[row]! - rank * local - first;
        expect(target, where).toBe(id >= 0 && id < leaf ? mine[id] : Number.NEGATIVE_INFINITY);

        const key: SamplingRow = { ...sampling[row]!, position: positions[row]! };
        const shift = rank * local + first;
        const perturbed = key.temperature > 0 && key.topK === 0;
        const all = new Float64Array(vocab).fill(Number.NEGATIVE_INFINITY);
        all.set(mine, shift);
        const score = perturbed ? scores(all, key) : new Map(ranking(all).map((t) => [t, all[t]!]));
        const best = [...score].sort(([a, x], [b, y]) => y - x || a - b).slice(0, Math.min(candidates, leaf));
        const given = rowsOf(list, 3).filter(([, , token]) => token !== NO_TOKEN);
        given.sort(([x, , a], [y, , b]) => y! - x! || a! - b!);
        expect(
          given.map(([, , token]) => token),
          where,
        ).toEqual(best.map(([token]) => token));
        for (const [c, [s, logit, token]] of given.entries()) {
          expect(logit, where).toBe(all[token!]);
          expect(Math.abs(s! - best[c]![1]), where).toBeLessThan(1e-4);
        }
      }
    }
    close();
  });
});

describe.each(DTYPES)('equal logits in %s', (dtype) => {
  it('leave the lower ids in the list of candidates', async () => {
    const shape: Shape = {
      hidden: 16,
      vocab: 96,
      softcap: 30,
      leaves: 2,
      candidates: 4,
      rank: 0,
      size: 1,
    };
    const { benches, close } = await openOps(planOf(shape, new Float32Array(96 * 16)), dtype, random);
    for (const { name, engine } of benches) {
      engine.begin(batchOf({ positions: [0], rows: [0] }));
      engine.writeBuffer('hidden', random.values(16, dtype));
      const { send } = engine.syncBuffers(await engine.run(0));
      const ids = rowsOf(send, 15).map((leaf) => [5, 8, 11, 14].map((i) => leaf[i]).sort((a, b) => a! - b!));
      expect(ids, name).toEqual([
        [0, 1, 2, 3],
        [48, 49, 50, 51],
      ]);
    }
    close();
  });
});
