import { describe, expect, it } from 'vitest';
import { StageReport } from '../../src/report/schema.js';
import { type StagePlace, type StepTimes, stageReport, stageTable } from '../../src/report/stages.js';

const place = (name: string, layer: number, sync = false): StagePlace => ({
  ...{ name, layer, sync },
  kind: layer < 0 ? 'head' : 'sliding',
});
const PLACES = [
  place('embed', -1),
  ...[0, 1].flatMap((layer) => [
    place('attnOut', layer),
    place('allReduce attnOut', layer, true),
    place('route', layer),
  ]),
];

const NONE = [Number.NaN, Number.NaN, Number.NaN];

/** A step of `us` microseconds from 1000 ns on; spans in us after that. */
function step(us: number, spans: number[][], bytes: number[] = []): StepTimes {
  return {
    begin: 1000,
    end: 1000 + 1000 * us,
    spans: Float64Array.from(spans.flat(), (x) => 1000 + 1000 * x),
    bytes: Float64Array.from(PLACES, (_, i) => bytes[i] ?? 0),
    blocks: new Int32Array(0),
    marks: new Float64Array(0),
  };
}

/** The host does the syncs. */
const HOST = step(
  100,
  [
    [1, 1, 3],
    [3, 3, 10],
    [12, 12, 20],
    [21, 21, 25],
    [25, 25, 35],
    [36, 36, 50],
    [52, 52, 60],
  ],
  [0, 7000, 0, 400, 10_000, 0, 800],
);
/** The stage behind a sync does it. */
const FUSED = step(50, [[1, 1, 3], [3, 3, 10], NONE, [10, 14, 20], [20, 22, 30], NONE, [30, 33, 40]]);

describe('the report of stages', () => {
  it('adds up to the step, with what no stage explains apart', () => {
    const report = StageReport.parse(
      stageReport(
        PLACES,
        [
          [HOST, HOST],
          [HOST, HOST],
        ],
        10,
      ),
    );
    expect(report.steps).toBe(2);
    expect(report.stages_us! + report.gaps_us! + report.outside_us!).toBeCloseTo(report.step_us!, 9);
    expect(report).toMatchObject({ step_us: 100, stages_us: 53, gaps_us: 6, outside_us: 41 });
    expect(report.sync_us).toBeCloseTo(8 + 14, 9);
  });

  it('joins the layers of a kind: calls, the median call, bytes and what they make of the bandwidth', () => {
    const { rows } = stageReport(PLACES, [[HOST]], 10);
    expect(rows.map(({ kind, stage }) => `${kind} ${stage}`)).toEqual([
      'head embed',
      'sliding attnOut',
      'sliding allReduce attnOut',
      'sliding route',
    ]);
    const attnOut = rows[1]!;
    expect(attnOut).toMatchObject({
      calls: 2,
      us: 8.5,
      us_per_token: 17,
      gap_us_per_token: 0,
      read_bytes: 17_000,
    });
    expect(attnOut.gb_per_s).toBeCloseTo(1, 9);
    expect(attnOut.share_of_bandwidth).toBeCloseTo(0.1, 9);
    expect(rows[2]).toMatchObject({ gap_us_per_token: 3 });
  });

  it('leaves out a sync that the stage behind it does, and counts that stage waiting as the sum', () => {
    const two = stageReport(PLACES, [[FUSED], [FUSED]], 10);
    expect(two.rows.map(({ stage }) => stage)).toEqual(['embed', 'attnOut', 'route']);
    expect(two.rows[2]!.wait_us_per_token).toBeCloseTo(7, 9);
    expect(two.sync_us).toBeCloseTo(7, 9);
    expect(two.rows[1]!.wait_us_per_token).toBeCloseTo(2, 9); // for blocks of its own GPU
    expect(stageReport(PLACES, [[FUSED]], 10).sync_us).toBe(0); // one rank has nobody to wait for
  });

  it('shows the difference between stages and step as rows of its own', () => {
    const lines = stageTable(stageReport(PLACES, [[HOST]], 10), 97).split('\n');
    const row = (name: string) =>
      lines
        .find((line) => line.startsWith(name))
        ?.trim()
        .split(/ {2,}/)
        .slice(1);
    expect(row('all stages')).toEqual(['53.0', '53 %']);
    expect(row('gaps between them')).toEqual(['6.00', '6.0 %']);
    expect(row('before, behind and unexplained')).toEqual(['41.0', '41 %']);
    expect(row('step, stages timed')).toEqual(['100', '100 %']);
    expect(row('step, nothing timed')).toEqual(['97.0']);
  });
});
