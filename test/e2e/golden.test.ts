// The command line against what Hugging Face transformers computed in fp32 with the same checkpoints.

import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { GenerateResult, ScoreResult } from '../../src/report/schema.js';
import { fixture, golden } from '../helpers/fixture.js';
import { tempDir } from '../helpers/tempdir.js';
import { readTensors } from '../helpers/tensors.js';
import { tpRunJson } from '../helpers/tp-run.js';

const CHECKPOINTS = [
  ['tiny-moe', [1, 2, 4]],
  ['tiny-moe-hub', [1, 2, 4, 8]],
] as const;

const cases = CHECKPOINTS.flatMap(([name, degrees]) => degrees.map((tp) => [name, tp] as const));

describe.each(cases)('%s at TP=%i in float32', (name, tp) => {
  const { prompts, greedy } = golden(name);
  const run = [
    ...['--gpus', `${tp}`, '--device', 'cpu', '--model', fixture(name), '--dtype', 'float32'],
    ...prompts.flatMap((ids) => ['--prompt-ids', ids.join(',')]),
  ];

  it('gives the logits of transformers within 1e-3 and their log-probabilities', async () => {
    const dump = join(tempDir(), 'logits.safetensors');
    const result = ScoreResult.parse(await tpRunJson(['score', ...run, '--dump-logits', dump]));
    const [ours, theirs] = [readTensors(dump), readTensors(fixture(`${name}/golden.safetensors`))];
    let worst = 0;
    for (const [i, ids] of prompts.entries()) {
      const [a, b] = [ours.float32(`prompt.${i}.logits`), theirs.float32(`fp32.${i}.logits`)];
      expect(ours.shape(`prompt.${i}.logits`)).toEqual(theirs.shape(`fp32.${i}.logits`));
      for (const [k, value] of a.entries()) worst = Math.max(worst, Math.abs(value - b[k]!));
      const vocab = b.length / ids.length;
      const { token_logprobs } = result.results[i]!;
      expect(token_logprobs).toHaveLength(ids.length);
      expect(token_logprobs[0]).toBeNull();
      for (const [t, id] of ids.entries()) {
        if (t > 0)
          expect(token_logprobs[t]).toBeCloseTo(logprob(b.subarray((t - 1) * vocab, t * vocab), id), 3);
      }
    }
    console.log(`${name} tp=${tp}: max |logit error| ${worst.toExponential(2)}`);
    expect(worst).toBeLessThan(1e-3);
    ours.close();
    theirs.close();
  });

  it('decodes the same greedy tokens with the same log-probabilities', async () => {
    const steps = greedy[0]!.tokens.length;
    const result = GenerateResult.parse(
      await tpRunJson(['generate', ...run, '--max-tokens', `${steps}`, '--temperature', '0', '--ignore-eos']),
    );
    expect(result.results.map(({ token_ids }) => token_ids)).toEqual(greedy.map(({ tokens }) => tokens));
    expect(result.results.map(({ prompt_ids }) => prompt_ids)).toEqual(prompts);
    for (const [i, { logprobs }] of result.results.entries()) {
      for (const [t, value] of logprobs.entries()) expect(value).toBeCloseTo(greedy[i]!.logprob[t]!, 3);
    }
    expect(result.run).toMatchObject({
      tp,
      device: 'cpu',
      dtype: 'float32',
      collective: tp === 1 ? 'local' : 'zmq',
    });
  });
});

/** Log-softmax of a row at `id`, in double precision. */
function logprob(row: Float32Array, id: number): number {
  const top = Math.max(...row);
  const sum = row.reduce((total, x) => total + Math.exp(x - top), 0);
  return row[id]! - top - Math.log(sum);
}
