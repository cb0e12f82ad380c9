import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { GenerateJob, StepReport } from '../../src/engine/job.js';
import { fixture, golden } from '../helpers/fixture.js';
import { openGolden } from '../helpers/ranks.js';

const TOKENS = 12;
const prompts = golden('tiny-moe').prompts.slice(0, 3);

/** Rows of every sequence in order: token, log-probability and logits. */
function rowsOf(reports: readonly StepReport[]) {
  const rows = new Map<number, { token: number; logprob: number; logits: Buffer }[]>();
  for (const { rows: said, logits } of reports) {
    const width = logits!.length / said.length;
    for (const [r, { sequence, token, logprob }] of said.entries()) {
      const bytes = Buffer.from(logits!.slice(r * width, (r + 1) * width).buffer);
      rows.set(sequence, [...(rows.get(sequence) ?? []), { token, logprob, logits: bytes }]);
    }
  }
  return rows;
}

describe.each(['bfloat16', 'float32'] as const)(
  'a sequence in %s that goes on behind given-out tokens',
  (dtype) => {
    let group: Awaited<ReturnType<typeof openGolden>>;
    beforeAll(async () => {
      group = await openGolden(fixture('tiny-moe'), { size: 2, dtype });
    });
    afterAll(() => group.close());

    const job = (sequences: GenerateJob['sequences']): GenerateJob => ({
      kind: 'generate',
      sequences,
      sampling: { temperature: 0.9, topK: 0, topP: 1, seed: 5 },
      stopTokenIds: [],
      keepLogits: true,
      fault: null,
    });

    it('gives the bits of one that was never cut, wherever each was cut', async () => {
      const whole = job(prompts.map((promptIds, sequence) => ({ promptIds, maxTokens: TOKENS, sequence })));
      const [undisturbed] = await group.run(whole);
      const expected = rowsOf(undisturbed!);
      for (const cuts of [
        [1, 1, 1],
        [5, 0, 11],
        [3, 7, 2],
      ]) {
        const rest = job(
          prompts.map((prompt, sequence) => {
            const given = expected
              .get(sequence)!
              .slice(0, cuts[sequence])
              .map(({ token }) => token);
            const maxTokens = TOKENS - given.length;
            return { promptIds: [...prompt, ...given], maxTokens, sequence, replay: given.length };
          }),
        );
        const [reports] = await group.run(rest);
        const rows = rowsOf(reports!);
        for (const [sequence, cut] of cuts.entries()) {
          const left = expected.get(sequence)!.slice(cut);
          expect(rows.get(sequence)!.map(({ token }) => token)).toEqual(left.map(({ token }) => token));
          for (const [i, row] of rows.get(sequence)!.entries()) {
            expect(Object.is(row.logprob, left[i]!.logprob)).toBe(true);
            expect(row.logits.equals(left[i]!.logits), `sequence ${sequence}, token ${cut + i}`).toBe(true);
          }
        }
      }
    });

    it('sends them through the path that made them: one at a time, after all prompts', async () => {
      const [prompt] = prompts;
      const [reports] = await group.run(
        job([{ promptIds: [...prompt!, 1, 2, 3], maxTokens: 2, sequence: 0, replay: 3 }]),
      );
      const steps = reports!.map(({ kind, tokens, rows }) => [kind, tokens.length, rows.length]);
      expect(steps).toEqual([
        ['prefill', prompt!.length, 0],
        ['prefill', 1, 0],
        ['prefill', 1, 0],
        ['decode', 1, 1],
        ['decode', 1, 1],
      ]);
    });
  },
);
