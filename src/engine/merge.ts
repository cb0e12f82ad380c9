// One step as the run sees it: the ranks' reports, compared bit by bit and joined.

import { fail } from '../errors.js';
import type { TraceEntry } from '../native.js';
import type { StepReport } from './job.js';

/** Rank 0's report with the logits of all ranks, [rows, vocab], and the trace over all virtual shards. */
export interface MergedStep extends StepReport {
  /** What is each rank's own, by rank. */
  ranks: Pick<StepReport, 'time' | 'readBytes' | 'expertsRead' | 'times'>[];
}

const ROW = ['sequence', 'position', 'token', 'logprob', 'targetLogprob', 'finish'] as const;

/** Joins one step's reports, given by rank. Throws TP_RANKS_DISAGREE where they must be equal and are not. */
export function mergeReports(reports: readonly StepReport[]): MergedStep {
  const first = reports[0]!;
  const same = (what: string, of: (report: StepReport) => unknown) =>
    requireEqual(first.step, what, reports, of);
  same('the step', (r) => `${r.step} (${r.kind})`);
  same('the tokens of the step', (r) => r.tokens.map((t) => `${t.sequence}:${t.position}`).join(' '));
  same('the number of rows', (r) => r.rows.length);
  for (const [i, { sequence, position }] of first.rows.entries()) {
    for (const key of ROW)
      same(`${key} (sequence ${sequence}, position ${position})`, (r) => r.rows[i]![key]);
  }
  same('the length of the logits', (r) => r.logits?.length);
  same('the stages of the trace', (r) =>
    r.trace?.map((e) => `${e.layer}.${e.stage}[${e.hashes.length}]`).join(' '),
  );
  const parts = reports.map((r) => r.logits!);
  const entries = (i: number) => reports.map((r) => r.trace![i]!);
  return {
    ...first,
    logits: first.logits && interleave(Float32Array, parts, first.rows.length),
    trace: first.trace?.map((_, i) => joinEntry(first.step, entries(i))) ?? null,
    ranks: reports.map(({ time, readBytes, expertsRead, times }) => ({
      time,
      readBytes,
      expertsRead,
      times,
    })),
  };
}

/** A sharded buffer's hashes become [rows, parts * ranks]; a replicated buffer's must be equal on all ranks. */
function joinEntry(step: number, entries: readonly TraceEntry[]): TraceEntry {
  const first = entries[0]!;
  if (first.sharded) {
    const rows = first.hashes.length / first.parts;
    const hashes = interleave(
      BigUint64Array,
      entries.map((e) => e.hashes),
      rows,
    );
    return { ...first, parts: first.parts * entries.length, hashes };
  }
  for (const row of first.hashes.keys()) {
    requireEqual(step, `row ${row} of ${first.stage} in layer ${first.layer}`, entries, (e) => e.hashes[row]);
  }
  return first;
}

/** Row r of the result is row r of every part, one after another. */
function interleave<A extends Float32Array | BigUint64Array>(
  make: new (length: number) => A,
  parts: readonly A[],
  rows: number,
): A {
  const width = rows ? parts[0]!.length / rows : 0;
  const whole = new make(rows * width * parts.length);
  for (let row = 0; row < rows; row++) {
    for (const [i, part] of parts.entries()) {
      const slice = part.subarray(row * width, (row + 1) * width) as never;
      whole.set(slice, (row * parts.length + i) * width);
    }
  }
  return whole;
}

function requireEqual<T>(step: number, what: string, ranks: readonly T[], of: (rank: T) => unknown): void {
  const values = ranks.map(of);
  if (values.every((value) => Object.is(value, values[0]))) return;
  const said = values.map((value, rank) => `rank ${rank}: ${value}`).join('; ');
  throw fail('TP_RANKS_DISAGREE', step, what, said);
}
