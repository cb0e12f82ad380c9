// The numbers contract in one process: logits are equal byte for byte whatever the TP degree, the batch, the chunks
// of the prompt, the threads or the instruction set.

import { describe, expect, it } from 'vitest';
import type { GenerateJob, SequenceSpec, StepReport } from '../../src/engine/job.js';
import { type Dtype, native } from '../../src/native.js';
import { fixture, golden } from '../helpers/fixture.js';
import { joinColumns, openGolden, type RanksOptions } from '../helpers/ranks.js';

const NEW_TOKENS = 24;

type Rows = Map<string, Buffer>; // `${sequence}@${position}` -> the row's logits

/** Logits of every generated token, and of every prompt token when `score`. */
async function logitsOf(
  name: string,
  options: RanksOptions,
  sequences: SequenceSpec[],
  score = false,
): Promise<Rows> {
  const group = await openGolden(fixture(name), options);
  const job: GenerateJob = {
    kind: 'generate',
    sequences,
    sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
    stopTokenIds: [],
    keepLogits: true,
    fault: null,
  };
  const reports = await group.run(score ? { ...job, kind: 'score' } : job);
  group.close();
  return rowsOf(reports);
}

function rowsOf(reports: StepReport[][]): Rows {
  const rows: Rows = new Map();
  for (const [step, first] of reports[0]!.entries()) {
    if (first.rows.length === 0) continue;
    const logits = joinColumns(
      reports.map((r) => r[step]!.logits!),
      first.rows.length,
    );
    const vocab = logits.length / first.rows.length;
    for (const [r, { sequence, position }] of first.rows.entries())
      rows.set(`${sequence}@${position}`, Buffer.from(logits.slice(r * vocab, (r + 1) * vocab).buffer));
  }
  return rows;
}

/** Rows that both hold must be equal; returns how many were compared. */
function compare(a: Rows, b: Rows): number {
  let compared = 0;
  for (const [key, row] of a) {
    const other = b.get(key);
    if (!other) continue;
    expect(row.equals(other), `logits of ${key}`).toBe(true);
    compared++;
  }
  return compared;
}

const sequencesOf = (name: string): SequenceSpec[] =>
  golden(name).prompts.map((promptIds, sequence) => ({ promptIds, maxTokens: NEW_TOKENS, sequence }));

describe.each(['tiny-moe', 'tiny-moe-hub'])('%s', (name) => {
  describe.each<Dtype>(['bfloat16', 'float32'])('%s', (dtype) => {
    const sequences = sequencesOf(name);
    const base = logitsOf(name, { size: 1, dtype }, sequences);
    const promptTokens = sequences.reduce((n, s) => n + s.promptIds.length, 0);

    it.each(name === 'tiny-moe' ? [2, 4] : [2, 4, 8])('gives the bits of tp=1 at tp=%i', async (size) => {
      expect(compare(await base, await logitsOf(name, { size, dtype }, sequences))).toBe(
        sequences.length * NEW_TOKENS,
      );
      const scored = await logitsOf(name, { size: 1, dtype }, sequences, true);
      expect(compare(scored, await logitsOf(name, { size, dtype }, sequences, true))).toBe(promptTokens);
    });

    it.each(native().version().isa)('gives the same bits with %s code', async (isa) => {
      expect(compare(await base, await logitsOf(name, { size: 1, dtype, isa }, sequences))).toBeGreaterThan(
        0,
      );
    });

    it('gives the same bits with three threads', async () => {
      expect(
        compare(await base, await logitsOf(name, { size: 1, dtype, threads: 3 }, sequences)),
      ).toBeGreaterThan(0);
    });

    it.each([1, 3, 7])('reads a prompt in chunks of %i tokens with the bits of one chunk', async (tokens) => {
      const limits = { tokens, sequences: 1 };
      const scored = await logitsOf(name, { size: 1, dtype }, sequences, true);
      expect(compare(scored, await logitsOf(name, { size: 1, dtype, limits }, sequences, true))).toBe(
        promptTokens,
      );
    });

    it('scores generated tokens with the bits that generated them', async () => {
      const group = await openGolden(fixture(name), { size: 1, dtype });
      const [reports] = await group.run({
        kind: 'generate',
        sequences,
        sampling: { temperature: 1, topK: 0, topP: 1, seed: 7 },
        stopTokenIds: [],
        keepLogits: true,
        fault: null,
      });
      const generated = rowsOf([reports!]);
      const whole = sequences.map((s) => ({
        ...s,
        promptIds: [
          ...s.promptIds,
          ...reports!
            .flatMap((r) => r.rows)
            .filter((r) => r.sequence === s.sequence)
            .map((r) => r.token),
        ],
      }));
      const scored = rowsOf(
        await group.run({ kind: 'score', sequences: whole, keepLogits: true, fault: null }),
      );
      group.close();
      expect(compare(generated, scored)).toBe(sequences.length * NEW_TOKENS);
    });

    it('gives a sequence the same bits alone, among seven others and at any place', async () => {
      const alone = await logitsOf(name, { size: 1, dtype }, [sequences[0]!]);
      const others: SequenceSpec[] = Array.from({ length: 7 }, (_, i) => ({
        promptIds: sequences[1 % sequences.length]!.promptIds.slice(0, 3 + 2 * i),
        maxTokens: NEW_TOKENS,
        sequence: 100 + i,
      }));
      for (const place of [0, 3, 7]) {
        const batch = [...others.slice(0, place), sequences[0]!, ...others.slice(place)];
        expect(compare(alone, await logitsOf(name, { size: 1, dtype }, batch))).toBe(NEW_TOKENS);
      }
    });
  });
});
