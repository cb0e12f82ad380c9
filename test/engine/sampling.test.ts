// Sampling through the whole engine: keyed randomness that no split and no batch changes, the right distribution,
// filters, and log-probabilities. The sampler alone is in test/ops/sample.test.ts.

import { describe, expect, it } from 'vitest';
import type { Sampling, SequenceSpec } from '../../src/engine/job.js';
import { candidatesFor } from '../../src/engine/sampler.js';
import type { Dtype } from '../../src/native.js';
import { fixture, golden } from '../helpers/fixture.js';
import { batchOf } from '../helpers/op.js';
import { openGolden, type RanksOptions } from '../helpers/ranks.js';
import { softmax } from '../helpers/reference.js';
import { kept, logProbabilities, ranking } from '../helpers/reference-sampling.js';

const VOCAB = 512;
const LEAF = VOCAB / 4; // of tiny-moe, which has 4 virtual shards
const NEW_TOKENS = 16;

const methods: Sampling[] = [
  { temperature: 0, topK: 0, topP: 1, seed: 5 },
  { temperature: 1, topK: 0, topP: 1, seed: 5 },
  { temperature: 0.7, topK: 20, topP: 1, seed: 5 },
  { temperature: 1.2, topK: 0, topP: 0.9, seed: 5 },
  { temperature: 1.2, topK: 50, topP: 0.8, seed: 5 },
];

const prompts = golden('tiny-moe').prompts;
/** After this prompt no token is likelier than one in ten. */
const open = prompts[0]!.slice(0, 5);
const sequencesOf = (numbers: number[]): SequenceSpec[] =>
  numbers.map((sequence) => ({
    promptIds: prompts[sequence % prompts.length]!,
    maxTokens: NEW_TOKENS,
    sequence,
  }));

interface Generated {
  tokens: number[];
  logprobs: number[];
}

async function generate(
  sampling: Sampling,
  sequences: SequenceSpec[],
  options: RanksOptions = { size: 1 },
  name = 'tiny-moe',
): Promise<Map<number, Generated>> {
  const limits = { candidates: candidatesFor(sampling, LEAF), ...options.limits };
  const group = await openGolden(fixture(name), { ...options, limits });
  const reports = await group.run({
    kind: 'generate',
    sequences,
    sampling,
    stopTokenIds: [],
    keepLogits: false,
    fault: null,
  });
  group.close();
  for (const rank of reports)
    expect(rank.map((step) => step.rows)).toEqual(reports[0]!.map((step) => step.rows));
  const rows = reports[0]!.flatMap((step) => step.rows);
  return new Map(
    sequences.map(({ sequence }) => {
      const mine = rows.filter((row) => row.sequence === sequence);
      return [sequence, { tokens: mine.map((r) => r.token), logprobs: mine.map((r) => r.logprob) }];
    }),
  );
}

describe.each(methods)('temperature $temperature, top-k $topK, top-p $topP', (sampling) => {
  it.each<[string, number, Dtype]>([
    ['tiny-moe', 2, 'bfloat16'],
    ['tiny-moe', 4, 'bfloat16'],
    ['tiny-moe', 4, 'float32'],
    ['tiny-moe-hub', 8, 'bfloat16'],
  ])('gives %s the tokens and log-probabilities of one rank at tp=%i in %s', async (name, size, dtype) => {
    const sequences = sequencesOf([0, 1]);
    expect(await generate(sampling, sequences, { size, dtype }, name)).toEqual(
      await generate(sampling, sequences, { size: 1, dtype }, name),
    );
  });

  it('gives a sequence the same tokens alone, among others and in any slot', async () => {
    const alone = await generate(sampling, sequencesOf([4]));
    expect(alone.get(4)!.tokens).toHaveLength(NEW_TOKENS);
    for (const numbers of [
      [4, 0, 1],
      [2, 3, 0, 1, 4],
    ]) {
      const batch = await generate(sampling, sequencesOf(numbers));
      expect(batch.get(4)).toEqual(alone.get(4));
    }
  });
});

describe('the random stream', () => {
  const sampling = methods[1]!;
  const sequences = [0, 1, 2].map((sequence) => ({ promptIds: open, maxTokens: NEW_TOKENS, sequence }));

  it('is the same for the same seed, and another for another seed or sequence', async () => {
    const once = await generate(sampling, sequences);
    expect(await generate(sampling, sequences)).toEqual(once);
    const texts = [
      ...once.values(),
      ...(await generate({ ...sampling, seed: 6 }, sequences)).values(),
      ...(await generate({ ...sampling, seed: 2 ** 32 - 1 }, sequences)).values(),
    ].map(({ tokens }) => tokens.join());
    expect(new Set(texts).size).toBe(9);
  });

  it('has no part in greedy decoding', async () => {
    const greedy = { ...sampling, temperature: 0 };
    const all = [...(await generate(greedy, sequences)).values()];
    expect(all[1]).toEqual(all[0]);
    expect(await generate({ ...greedy, seed: 99 }, sequences)).toEqual(await generate(greedy, sequences));
  });
});

/** `count` draws after one prompt, and the logits they were drawn from. */
async function draws(count: number, filter: Omit<Sampling, 'seed'>, seed: number) {
  const rows = 512;
  const group = await openGolden(fixture('tiny-moe'), {
    size: 1,
    limits: { rows, candidates: candidatesFor({ ...filter, seed }, LEAF) },
  });
  const { engine } = group.ranks[0]!;
  const tokens: number[] = [];
  const logprobs: number[] = [];
  for (let first = 0; first < count; first += rows) {
    engine.begin(
      batchOf({
        tokens: open,
        positions: open.map((_, p) => p),
        rows: Array(rows).fill(open.length - 1),
        sampling: Array.from({ length: rows }, (_, r) => ({ ...filter, seed, sequence: first + r })),
      }),
    );
    await engine.run(0);
    const result = engine.result();
    tokens.push(...result.tokens);
    logprobs.push(...result.logprobs);
  }
  const logits = engine.logits().subarray(0, VOCAB);
  group.close();
  return { tokens, logprobs, logits };
}

/** Chi-square of counts against probabilities, in standard deviations above its mean; rare tokens share a bin. */
function chiSquare(tokens: readonly number[], probability: ReadonlyMap<number, number>): number {
  const counts = new Map<number, number>();
  for (const token of tokens) counts.set(token, (counts.get(token) ?? 0) + 1);
  const bins: { seen: number; expected: number }[] = [{ seen: 0, expected: 0 }];
  for (const [token, p] of probability) {
    const bin = { seen: counts.get(token) ?? 0, expected: p * tokens.length };
    if (bin.expected >= 5) bins.push(bin);
    else {
      bins[0]!.seen += bin.seen;
      bins[0]!.expected += bin.expected;
    }
  }
  const used = bins.filter((bin) => bin.expected > 0);
  expect(used.length).toBeGreaterThan(2);
  const statistic = used.reduce((sum, { seen, expected }) => sum + (seen - expected) ** 2 / expected, 0);
  return (statistic - (used.length - 1)) / Math.sqrt(2 * (used.length - 1));
}

/** Probabilities after the filters. */
function filtered(logits: Float32Array, filter: Omit<Sampling, 'seed'>): Map<number, number> {
  const ids = kept(logits, filter);
  const p = softmax(ids.map((id) => logits[id]! / filter.temperature));
  return new Map(ids.map((id, i) => [id, p[i]!]));
}

describe.each<Omit<Sampling, 'seed'>>([
  { temperature: 1, topK: 0, topP: 1 },
  { temperature: 0.5, topK: 0, topP: 1 },
  { temperature: 2, topK: 0, topP: 1 },
  { temperature: 1.5, topK: 12, topP: 1 },
  { temperature: 1, topK: 0, topP: 0.7 },
  { temperature: 1.5, topK: 30, topP: 0.6 },
])('4096 draws at temperature $temperature, top-k $topK, top-p $topP', (filter) => {
  it('follow the softmax of what the filters leave, and nothing else', async () => {
    const { tokens, logprobs, logits } = await draws(4096, filter, 20_240_607);
    const wanted = filtered(logits, filter);
    for (const token of tokens) expect(wanted.has(token)).toBe(true);
    expect(chiSquare(tokens, wanted)).toBeLessThan(3.5);
    // The same draws do not pass for another temperature's.
    const other = filtered(logits, { ...filter, temperature: filter.temperature * 1.5 });
    expect(
      chiSquare(tokens, new Map([...wanted.keys()].map((id) => [id, other.get(id) ?? 1e-9]))),
    ).toBeGreaterThan(3.5);
    // Log-probabilities know neither temperature nor filter.
    const full = logProbabilities(logits);
    for (const [i, token] of tokens.entries())
      expect(Math.abs(logprobs[i]! - full[token]!)).toBeLessThan(1e-5);
  });
});

describe.each([1, 2, 4])('log-probabilities of targets at tp=%i', (size) => {
  it('are those of the whole vocabulary and sum to 1', async () => {
    const group = await openGolden(fixture('tiny-moe'), { size, limits: { rows: VOCAB } });
    const prompt = prompts[1]!;
    const batch = batchOf({
      tokens: prompt,
      positions: prompt.map((_, p) => p),
      rows: Array(VOCAB).fill(prompt.length - 1),
      targets: Array.from({ length: VOCAB }, (_, id) => id),
    });
    const results = await Promise.all(
      group.ranks.map(async ({ engine, collective, plan }) => {
        engine.begin(batch);
        for (let at = 0; ; at++) {
          at = await engine.run(at);
          if (at === plan.steps.length) return engine.result();
          const { send, gathered } = engine.syncBuffers(at);
          await (gathered ? collective.gather(send, gathered) : collective.allReduce(send));
        }
      }),
    );
    const logits = group.ranks.flatMap(({ engine }) => [...engine.logits().subarray(0, VOCAB / size)]);
    group.close();
    const want = logProbabilities(logits);
    for (const { tokens, logprobs, targetLogprobs } of results) {
      for (const [id, logprob] of targetLogprobs.entries())
        expect(Math.abs(logprob - want[id]!)).toBeLessThan(1e-5);
      expect(targetLogprobs.reduce((sum, x) => sum + Math.exp(x), 0)).toBeCloseTo(1, 4);
      const best = ranking(logits)[0]!;
      expect(tokens[0]).toBe(best);
      expect(logprobs[0]).toBe(targetLogprobs[best]);
    }
    expect(results.every((r) => r.targetLogprobs.every((x, i) => x === results[0]!.targetLogprobs[i]))).toBe(
      true,
    );
  });
});
