import { describe, expect, it } from 'vitest';
import { Comparer, distanceOf, type Level } from '../../src/cli/compare.js';
import { Transcript } from '../../src/cli/transcript.js';
import type { StepReport } from '../../src/engine/job.js';

/** Two layers of two stages, one of them in two virtual shards, then the logits of the last token. */
function step(
  sequence: number,
  positions: number[],
  change: (report: StepReport) => void = () => {},
): StepReport {
  const tokens = positions.map((position) => ({ sequence, position }));
  const hashes = (salt: number, parts: number, rows: number) =>
    BigUint64Array.from({ length: rows * parts }, (_, i) =>
      BigInt(salt * 1000 + sequence * 100 + positions[0]! + i),
    );
  const stage = (layer: number, stage: string, parts: number, salt: number) => ({
    stage,
    layer,
    parts,
    sharded: parts > 1,
    hashes: hashes(salt, parts, positions.length),
  });
  const report: StepReport = {
    step: 0,
    kind: 'prefill',
    tokens,
    rows: [{ ...tokens.at(-1)!, token: 7, logprob: -1, targetLogprob: null, finish: null }],
    time: { computeMs: 1, syncMs: 1, hostMs: 1 },
    readBytes: 1,
    expertsRead: 1,
    logits: Float32Array.of(0.5, -1, 2, 0),
    trace: [
      stage(0, 'qkv', 2, 1),
      stage(0, 'down', 1, 2),
      stage(1, 'qkv', 2, 3),
      stage(1, 'down', 1, 4),
      { stage: 'logits', layer: -1, parts: 1, sharded: false, hashes: hashes(5, 1, 1) },
    ],
    times: null,
  };
  change(report);
  return report;
}

function compare(base: StepReport[], other: StepReport[], level: Level = 'layers') {
  const transcript = new Transcript();
  for (const report of base) transcript.add(report);
  const sequences = new Set(base.flatMap(({ tokens }) => tokens.map(({ sequence }) => sequence)));
  const comparer = new Comparer(transcript, level, sequences);
  for (const report of other) comparer.add(report);
  return comparer.finish();
}

describe('Comparer', () => {
  it('finds equal runs equal and counts what it compared', () => {
    const run = () => [step(0, [0, 1, 2]), step(1, [0, 1])];
    expect(compare(run(), run())).toEqual({
      compared: { tokens: 2, rows: 2, values: 8, outputs: 25 },
      differing: { sequences: 0, cells: 0 },
      first: null,
      distance: null,
    });
  });

  it('does not care how a sequence was cut into steps or in which order steps came', () => {
    const whole = [step(0, [0, 1]), step(1, [4])];
    const parts = [step(1, [4]), step(0, [0, 1])];
    expect(compare(whole, parts).first).toBeNull();
  });

  it.each([
    [0, 'qkv', 0],
    [0, 'down', 1],
    [1, 'qkv', 2],
    [1, 'down', 3],
  ])('names layer %i, stage %s, when one hash of it differs', (layer, stage, entry) => {
    const other = step(0, [0, 1, 2], ({ trace }) => {
      const { hashes, parts } = trace![entry]!;
      hashes[parts + (parts - 1)]! ^= 1n; // the last shard of the token at position 1
    });
    const { first, differing } = compare([step(0, [0, 1, 2])], [other]);
    expect(first).toEqual({ sequence: 0, position: 1, layer, stage, what: 'output' });
    expect(differing).toEqual({ sequences: 1, cells: 1 });
  });

  it('names the earliest position of the lowest sequence, and there the earliest stage', () => {
    const spoil = (entries: [entry: number, row: number][]) => (report: StepReport) => {
      for (const [entry, row] of entries)
        report.trace![entry]!.hashes[row * report.trace![entry]!.parts]! ^= 1n;
    };
    const base = [step(0, [0, 1, 2]), step(1, [0, 1, 2]), step(2, [0, 1, 2])];
    const other = [
      step(2, [0, 1, 2], spoil([[0, 0]])),
      step(
        1,
        [0, 1, 2],
        spoil([
          [1, 2],
          [3, 1],
          [2, 1],
        ]),
      ),
      step(0, [0, 1, 2]),
    ];
    const { first, differing } = compare(base, other);
    expect(first).toEqual({ sequence: 1, position: 1, layer: 1, stage: 'qkv', what: 'output' });
    expect(differing).toEqual({ sequences: 2, cells: 3 });
  });

  it('tells -0 from 0 in logits and says how far rows are apart', () => {
    const other = step(0, [0], ({ logits }) => logits!.set([-0], 3));
    const { first, distance } = compare([step(0, [0])], [other]);
    expect(first).toEqual({ sequence: 0, position: 0, layer: -1, stage: 'logits', what: 'logits' });
    expect(distance).toEqual({ maxDelta: 0, maxUlp: 1, topFlips: 0 });
  });

  it('leaves out of the distance what follows a different token', () => {
    const flip = step(0, [1], ({ rows, logits }) => {
      rows[0]!.token = 3;
      logits![1] = 4;
    });
    const later = step(0, [2], ({ logits }) => logits!.fill(100));
    const { distance } = compare([step(0, [0]), step(0, [1]), step(0, [2])], [step(0, [0]), flip, later]);
    expect(distance).toMatchObject({ maxDelta: 5, topFlips: 1 });
  });

  it('looks only as deep as its level', () => {
    const trace = step(0, [0], (report) => (report.trace![0]!.hashes[0]! ^= 1n));
    const logits = step(0, [0], (report) => (report.logits![0] = 9));
    const token = step(0, [0], ({ rows }) => (rows[0]!.token = 8));
    const differs = (other: StepReport, level: Level) =>
      compare([step(0, [0])], [other], level).first !== null;
    expect([trace, logits, token].map((other) => differs(other, 'layers'))).toEqual([true, true, true]);
    expect([trace, logits, token].map((other) => differs(other, 'logits'))).toEqual([false, true, true]);
    expect([trace, logits, token].map((other) => differs(other, 'tokens'))).toEqual([false, false, true]);
  });

  it('compares log-probabilities by their bits', () => {
    const other = step(0, [0], ({ rows }) => (rows[0]!.logprob = -1 + Number.EPSILON));
    expect(compare([step(0, [0])], [other]).first).toMatchObject({ stage: 'sample', what: 'output' });
    const nan = () => step(0, [0], ({ rows }) => (rows[0]!.logprob = Number.NaN));
    expect(compare([nan()], [nan()]).first).toBeNull();
  });

  it('reports positions that only one run has', () => {
    const missing = { layer: -1, stage: 'embed', what: 'missing' };
    expect(compare([step(0, [0, 1])], []).first).toEqual({ sequence: 0, position: 0, ...missing });
    expect(compare([step(0, [0])], [step(0, [0]), step(0, [1])]).first).toEqual({
      sequence: 0,
      position: 1,
      ...missing,
    });
  });

  it('refuses traces of different stages', () => {
    const other = step(0, [0], ({ trace }) => trace!.pop());
    expect(() => compare([step(0, [0])], [other])).toThrow(
      /TP_INTERNAL: traces of 5 and 4 stages do not match/,
    );
  });

  it('still compares rows by their hashes when the transcript has no room for them', () => {
    const transcript = new Transcript(0);
    transcript.add(step(0, [0]));
    expect(transcript.cell(0, 0)!.row!.logits).toBeNull();
    const comparer = new Comparer(transcript, 'layers', new Set([0]));
    comparer.add(step(0, [0], ({ logits }) => logits!.set([3], 0)));
    expect(comparer.finish()).toMatchObject({ first: { what: 'logits' }, distance: null });
  });
});

describe('distanceOf', () => {
  const one = (a: number, b: number) => distanceOf(Float32Array.of(a), Float32Array.of(b));

  it('counts representable numbers between two', () => {
    expect(one(1, 1 + 2 ** -23)).toMatchObject({ maxUlp: 1, maxDelta: 2 ** -23 });
    expect(one(-1, -1 - 2 ** -23).maxUlp).toBe(1);
    expect(one(0, 2 ** -149).maxUlp).toBe(1);
    expect(one(-(2 ** -149), 2 ** -149).maxUlp).toBe(3); // -0 and 0 lie between
  });

  it('takes a NaN against a number for as far as can be, and equal NaNs for equal', () => {
    expect(one(Number.NaN, 1).maxDelta).toBe(Infinity);
    expect(one(Number.NaN, Number.NaN)).toEqual({ maxDelta: 0, maxUlp: 0, topFlips: 0 });
  });

  it('sees when the likeliest token changes', () => {
    expect(distanceOf(Float32Array.of(1, 2), Float32Array.of(2, 1)).topFlips).toBe(1);
    expect(distanceOf(Float32Array.of(1, 2), Float32Array.of(1, 3)).topFlips).toBe(0);
  });
});
