// Where the time of a decode step goes, stage by stage, and what each stage reads. Nothing is left over: what no stage
// accounts for has rows of its own.

import type { StageTimes } from '../native.js';
import type { StageReport } from './schema.js';
import { mean, quantile } from './stats.js';
import { percent, short, table } from './table.js';

/** When one rank's step and its stages ran; `spans` of a sync that the host did are its. */
export interface StepTimes extends StageTimes {
  /** Of the whole step, in ns of the host's monotonic clock. */
  begin: number;
  end: number;
}

/** What a step of the plan is called. */
export interface StagePlace {
  name: string;
  kind: 'sliding' | 'full' | 'head';
  layer: number; // -1 outside the layers
  sync: boolean;
}

/** One step of the plan in one decode step, in us; null where it does not stand by itself. */
export interface Span {
  begin: number;
  /** Its inputs were there. */
  inputs: number;
  end: number;
}

/** Entry `i` of [n, 3] times in ns, in us after `zero` (ns). */
export function spanAt(times: Float64Array, i: number, zero: number): Span | null {
  const [begin, inputs, end] = Array.from(times.subarray(3 * i, 3 * i + 3), (ns) => (ns - zero) / 1000);
  return Number.isNaN(begin) ? null : { begin: begin!, inputs: inputs!, end: end! };
}

interface Tally {
  place: StagePlace;
  us: number[];
  waitUs: number;
  gapUs: number;
  bytes: number;
}

/**
 * `ranks`: each rank's timed steps; `bandwidth`: GB/s that one rank reads at. Figures are of one rank: medians over all
 * calls, and averages over ranks and steps of what a token costs, which add up to the step.
 */
export function stageReport(
  places: readonly StagePlace[],
  ranks: readonly (readonly StepTimes[])[],
  bandwidth: number,
): StageReport {
  const steps = ranks.flat();
  const tallies = new Map<string, Tally>();
  let outsideUs = 0;
  let syncUs = 0;
  for (const step of steps) {
    let last: number | null = null;
    let stagesUs = 0;
    for (const [i, place] of places.entries()) {
      const span = spanAt(step.spans, i, step.begin);
      if (!span) continue;
      const tally = tallyOf(tallies, place);
      const [us, waitUs, gapUs] = [
        span.end - span.begin,
        span.inputs - span.begin,
        span.begin - (last ?? span.begin),
      ];
      tally.us.push(us);
      tally.waitUs += waitUs;
      tally.gapUs += gapUs;
      tally.bytes += step.bytes[i]!;
      stagesUs += us + gapUs;
      last = span.end;
      // a stage that follows a sync which does not stand by itself does that sync: it waits for the other ranks too
      const syncs = place.sync || (places[i - 1]?.sync && !spanAt(step.spans, i - 1, step.begin));
      if (syncs && ranks.length > 1) syncUs += place.sync ? us : waitUs;
    }
    outsideUs += (step.end - step.begin) / 1000 - stagesUs;
  }
  const stepUs = mean(steps.map(({ begin, end }) => (end - begin) / 1000));
  const perStep = (total: number) => total / steps.length;
  const rows = [...tallies.values()].map(({ place, us, waitUs, gapUs, bytes }) => {
    const usPerToken = perStep(us.reduce((sum, x) => sum + x, 0));
    const gbPerS = perStep(bytes) / 1e3 / usPerToken;
    return {
      stage: place.name,
      kind: place.kind,
      calls: perStep(us.length),
      us: quantile(us, 0.5),
      us_per_token: usPerToken,
      wait_us_per_token: perStep(waitUs),
      gap_us_per_token: perStep(gapUs),
      read_bytes: perStep(bytes),
      gb_per_s: gbPerS,
      share_of_bandwidth: gbPerS / bandwidth,
      share: usPerToken / stepUs,
    };
  });
  const sum = (of: (row: (typeof rows)[number]) => number) => rows.reduce((all, row) => all + of(row), 0);
  return {
    steps: ranks[0]?.length ?? 0,
    rows,
    stages_us: sum((row) => row.us_per_token),
    gaps_us: sum((row) => row.gap_us_per_token),
    outside_us: perStep(outsideUs),
    step_us: stepUs,
    sync_us: perStep(syncUs),
  };
}

function tallyOf(tallies: Map<string, Tally>, place: StagePlace): Tally {
  const key = `${place.kind} ${place.name}`;
  const tally = tallies.get(key) ?? { place, us: [], waitUs: 0, gapUs: 0, bytes: 0 };
  tallies.set(key, tally);
  return tally;
}

/** The report as headings and cells; `untimedUs`: median of the step while nothing inside it is timed. */
export function stageCells(report: StageReport, untimedUs: number): { headings: string[]; rows: string[][] } {
  const stages = report.rows.map((row) => [
    row.stage,
    row.kind,
    ...[row.calls, row.us, row.us_per_token, row.wait_us_per_token, row.gap_us_per_token].map((x) =>
      short(x!),
    ),
    ...(row.read_bytes! > 0
      ? [short(row.read_bytes! / 1e6), short(row.gb_per_s!), percent(row.share_of_bandwidth!)]
      : ['', '', '']),
    percent(row.share!),
  ]);
  const ofStep = (us: number) => percent(us / report.step_us!);
  const total = (name: string, us: number, share = ofStep(us)) => [
    ...[name, '', '', '', short(us), '', '', '', '', ''],
    share,
  ];
  return {
    headings: [
      ...['stage', 'layers', 'calls', 'us a call', 'us a token', 'of it waiting', 'gap before'],
      ...['MB', 'GB/s', 'of bandwidth', 'share'],
    ],
    rows: [
      ...stages,
      total('all stages', report.stages_us!),
      total('gaps between them', report.gaps_us!),
      total('before, behind and unexplained', report.outside_us!),
      total('step, stages timed', report.step_us!),
      total('step, nothing timed', untimedUs, ''),
    ],
  };
}

export function stageTable(report: StageReport, untimedUs: number): string {
  const { headings, rows } = stageCells(report, untimedUs);
  return table(headings, rows);
}
