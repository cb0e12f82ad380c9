// Parity with Hugging Face transformers: hidden states after every layer, routing, logits and greedy tokens of both
// golden checkpoints in float32, at every TP degree they allow.

import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { GenerateJob, ScoreJob } from '../../src/engine/job.js';
import { fixture, golden as readGolden } from '../helpers/fixture.js';
import { joinColumns, openGolden } from '../helpers/ranks.js';
import { readTensors } from '../helpers/tensors.js';

const BOUND = 1e-3;

const cases = [
  { name: 'tiny-moe', sizes: [1, 2, 4] },
  { name: 'tiny-moe-hub', sizes: [1, 2, 4, 8] },
];

describe.each(cases)('$name', ({ name, sizes }) => {
  const dir = fixture(name);
  const golden = readGolden(name);
  const tensors = readTensors(join(dir, 'golden.safetensors'));
  const sequences = golden.prompts.map((promptIds, sequence) => ({ promptIds, maxTokens: 0, sequence }));

  it.each(sizes)('gives the logits of transformers at tp=%i', async (size) => {
    const group = await openGolden(dir, { size });
    const job: ScoreJob = { kind: 'score', sequences, keepLogits: true, fault: null };
    const reports = await group.run(job);
    group.close();
    let worst = 0;
    for (const [step, first] of reports[0]!.entries()) {
      const logits = joinColumns(
        reports.map((r) => r[step]!.logits!),
        first.rows.length,
      );
      const vocab = logits.length / first.rows.length;
      for (const [r, row] of first.rows.entries()) {
        const want = tensors
          .float32(`fp32.${row.sequence}.logits`)
          .subarray(row.position * vocab, (row.position + 1) * vocab);
        worst = Math.max(worst, maxDifference(logits.subarray(r * vocab, (r + 1) * vocab), want));
      }
    }
    console.log(`${name} tp=${size}: max |logit error| ${worst.toExponential(2)}`);
    expect(worst).toBeLessThan(BOUND);
  });

  it.each(sizes)('chooses the greedy tokens of transformers at tp=%i', async (size) => {
    const group = await openGolden(dir, { size });
    const steps = golden.greedy[0]!.tokens.length;
    const job: GenerateJob = {
      kind: 'generate',
      sequences: sequences.map((s) => ({ ...s, maxTokens: steps })),
      sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
      stopTokenIds: [],
      keepLogits: false,
      fault: null,
    };
    const [reports] = await group.run(job);
    group.close();
    for (const { sequence } of sequences) {
      const rows = reports!.flatMap((r) => r.rows).filter((r) => r.sequence === sequence);
      expect(rows.map((r) => r.token)).toEqual(golden.greedy[sequence]!.tokens);
      const logprobs = golden.greedy[sequence]!.logprob;
      for (const [i, row] of rows.entries()) expect(Math.abs(row.logprob - logprobs[i]!)).toBeLessThan(BOUND);
    }
  });
});

function maxDifference(a: Float32Array, b: Float32Array): number {
  let worst = 0;
  for (let i = 0; i < a.length; i++) {
    const d = Math.abs(a[i]! - b[i]!);
    if (Number.isNaN(d)) return d; // no bound is above it
    worst = Math.max(worst, d);
  }
  return worst;
}
