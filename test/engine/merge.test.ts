import { describe, expect, it } from 'vitest';
import type { StepReport } from '../../src/engine/job.js';
import { mergeReports } from '../../src/engine/merge.js';
import type { TraceEntry } from '../../src/native.js';

/** A report of two rows, over a vocabulary of which each rank has three logits. */
function report(rank: number, change: Partial<StepReport> = {}): StepReport {
  return {
    step: 7,
    kind: 'decode',
    tokens: [
      { sequence: 0, position: 4 },
      { sequence: 1, position: 9 },
    ],
    rows: [
      { sequence: 0, position: 4, token: 11, logprob: -0.5, targetLogprob: null, finish: null },
      { sequence: 1, position: 9, token: 12, logprob: -1.5, targetLogprob: null, finish: 'stop' },
    ],
    time: { computeMs: 1 + rank, syncMs: 2, hostMs: 3 },
    readBytes: 100 + rank,
    expertsRead: 5,
    logits: Float32Array.from([0, 1, 2, 10, 11, 12], (x) => x + 100 * rank),
    trace: null,
    times: null,
    ...change,
  };
}

const entry = (sharded: boolean, parts: number, hashes: number[]): TraceEntry => ({
  stage: 'attnOut',
  layer: 2,
  parts,
  sharded,
  hashes: BigUint64Array.from(hashes, BigInt),
});

describe('the reports of one step', () => {
  it('are joined to whole logits rows, rank after rank', () => {
    const { logits } = mergeReports([report(0), report(1)]);
    expect([...logits!]).toEqual([0, 1, 2, 100, 101, 102, 10, 11, 12, 110, 111, 112]);
  });

  it('keep what is each rank’s own', () => {
    const { ranks } = mergeReports([report(0), report(1)]);
    expect(ranks.map((r) => [r.time.computeMs, r.readBytes])).toEqual([
      [1, 100],
      [2, 101],
    ]);
  });

  it('of a single rank are taken as they are', () => {
    const { logits, rows } = mergeReports([report(0)]);
    expect([...logits!]).toEqual([0, 1, 2, 10, 11, 12]);
    expect(rows).toEqual(report(0).rows);
  });

  it('without rows or logits are joined too: a prompt chunk has none', () => {
    const quiet = { rows: [], logits: new Float32Array(0) };
    expect(mergeReports([report(0, quiet), report(1, quiet)]).logits).toHaveLength(0);
    expect(mergeReports([report(0, { logits: null }), report(1, { logits: null })]).logits).toBeNull();
  });

  it('put the hashes of sharded buffers side by side, row by row', () => {
    const traces = [
      [1, 2, 3, 4],
      [5, 6, 7, 8],
    ].map((hashes) => [entry(true, 2, hashes)]);
    const [joined] = mergeReports([report(0, { trace: traces[0]! }), report(1, { trace: traces[1]! })])
      .trace!;
    expect(joined!.parts).toBe(4);
    expect([...joined!.hashes].map(Number)).toEqual([1, 2, 5, 6, 3, 4, 7, 8]);
  });

  it('must hash replicated buffers alike', () => {
    const [same, other] = [[entry(false, 1, [1, 2])], [entry(false, 1, [1, 3])]];
    expect(mergeReports([report(0, { trace: same }), report(1, { trace: same })]).trace).toEqual(same);
    expect(() => mergeReports([report(0, { trace: same }), report(1, { trace: other })])).toThrow(
      'TP_RANKS_DISAGREE: step 7: ranks disagree on row 1 of attnOut in layer 2: rank 0: 2; rank 1: 3',
    );
  });

  it.each([
    ['token', { token: 13 }, 'token (sequence 1, position 9): rank 0: 12; rank 1: 13'],
    [
      'logprob',
      { logprob: -1.5000001 },
      'logprob (sequence 1, position 9): rank 0: -1.5; rank 1: -1.5000001',
    ],
    ['finish', { finish: null }, 'finish (sequence 1, position 9): rank 0: stop; rank 1: null'],
  ] as const)('that differ in a %s are fatal, and say where and how', (_, change, text) => {
    const [first, second] = report(1).rows;
    const reports = [report(0), report(1, { rows: [first!, { ...second!, ...change }] })];
    expect(() => mergeReports(reports)).toThrow(`TP_RANKS_DISAGREE: step 7: ranks disagree on ${text}`);
  });

  it('tell 0 from -0 and one NaN is like another', () => {
    const rows = (logprob: number) => [{ ...report(0).rows[0]!, logprob }];
    const merge = (a: number, b: number) =>
      mergeReports([report(0, { rows: rows(a) }), report(1, { rows: rows(b) })]);
    expect(() => merge(0, -0)).toThrow('TP_RANKS_DISAGREE');
    expect(merge(Number.NaN, Number.NaN).rows[0]!.logprob).toBeNaN();
  });

  it.each([
    ['step', { step: 8 }],
    ['kind', { kind: 'prefill' }],
    ['tokens', { tokens: [] }],
    ['number of rows', { rows: [] }],
    ['length of the logits', { logits: null }],
    ['stages of the trace', { trace: [] }],
  ] as const)('that differ in the %s are fatal', (_, change) => {
    const other = report(1, change as unknown as Partial<StepReport>);
    expect(() => mergeReports([report(0), other])).toThrow('TP_RANKS_DISAGREE: step 7');
  });
});
