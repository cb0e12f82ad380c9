import { describe, expect, it } from 'vitest';
import type { StagePlace, StepTimes } from '../../src/report/stages.js';
import { chromeTrace, type TraceEvent } from '../../src/report/trace.js';
import { expectNesting, inside, timedOf } from '../helpers/trace-events.js';

const PLACES: StagePlace[] = [
  { name: 'qkv', kind: 'full', layer: 0, sync: false },
  { name: 'allReduce attnOut', kind: 'full', layer: 0, sync: true },
  { name: 'route', kind: 'full', layer: 0, sync: false },
];
const NONE = [Number.NaN, Number.NaN, Number.NaN];

/** Times in ns from `at` on. */
function step(at: number, spans: number[][], marks: number[][] = []): StepTimes {
  const ns = (list: number[][]) => Float64Array.from(list.flat(), (x) => at + x);
  return {
    begin: at,
    end: at + 10_000,
    spans: ns(spans),
    bytes: Float64Array.of(8000, 0, 0),
    blocks: Int32Array.from(marks.length ? [0, 131] : []),
    marks: ns(marks),
  };
}

const hostStep = (at: number) =>
  step(at, [
    [1000, 1000, 3000],
    [3500, 3500, 5000],
    [6000, 6000, 9000],
  ]);
const gpuStep = (at: number) =>
  step(
    at,
    [[1000, 2000, 4000], NONE, [4000, 6000, 9000]],
    [...[[1000, 1500, 3800], NONE, [3800, 6000, 9000]], ...[[1000, 1000, 4000], NONE, [4000, 5500, 8000]]],
  );

const steps = (events: readonly TraceEvent[]) =>
  timedOf(events).filter(({ name }) => name.startsWith('step'));

describe('a trace', () => {
  const ranks = [0, 1].map((rank) => ({
    rank,
    host: 'a',
    steps: [hostStep(5e14 + 300 * rank), hostStep(5e14 + 20_000)],
  }));

  it('has a named process for each rank, a thread for stages and one for syncs', () => {
    const { traceEvents } = chromeTrace(PLACES, ranks);
    const named = traceEvents
      .filter(({ ph }) => ph === 'M')
      .map(({ pid, tid, args }) => [pid, tid, args!.name]);
    expect(named).toEqual(
      [0, 1].flatMap((rank) => [
        [rank, 0, `rank ${rank} on a`],
        [rank, 0, 'stages'],
        [rank, 1, 'syncs'],
      ]),
    );
    const syncs = timedOf(traceEvents).filter(({ tid }) => tid === 1);
    expect(new Set(syncs.map(({ name }) => name))).toEqual(new Set(['allReduce attnOut']));
  });

  it('begins with the first step and keeps the ranks of a host on its one clock', () => {
    const { traceEvents } = chromeTrace(PLACES, ranks);
    expect(steps(traceEvents).map(({ pid, ts, dur }) => [pid, ts, dur])).toEqual([
      [0, 0, 10],
      [0, 20, 10],
      [1, 0.3125, 10].map((x, i) => (i === 1 ? expect.closeTo(0.3, 1) : x)),
      [1, 20, 10],
    ]);
  });

  it('nests stages in steps and waiting in stages, on blocks too', () => {
    const { traceEvents } = chromeTrace(PLACES, [
      { rank: 0, host: 'a', steps: [gpuStep(0), gpuStep(20_000)] },
    ]);
    expectNesting(traceEvents);
    const blocks = timedOf(traceEvents).filter(({ tid }) => tid >= 2);
    expect(new Set(blocks.map(({ tid }) => tid))).toEqual(new Set([2, 3]));
    const [first] = steps(traceEvents);
    expect(
      timedOf(traceEvents)
        .filter((event) => event.ts < 10)
        .every((event) => inside(event, first!)),
    ).toBe(true);
    expect(timedOf(traceEvents).filter(({ name, tid }) => name === 'wait' && tid === 0)).toHaveLength(4);
  });

  it('shifts a rank on another host so that its sums end when those of rank 0 do', () => {
    const far = { rank: 1, host: 'b', steps: [hostStep(7e12), hostStep(7e12 + 20_000)] };
    const { traceEvents } = chromeTrace(PLACES, [
      { rank: 0, host: 'a', steps: [hostStep(100), hostStep(20_100)] },
      far,
    ]);
    expect(steps(traceEvents).map(({ ts }) => Math.round(ts))).toEqual([0, 20, 0, 20]);
  });
});
