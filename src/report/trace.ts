// A few decode steps as Chrome trace events, which Perfetto and chrome://tracing open: a process for each rank, in it a
// thread for the stages, one for the syncs that stand by themselves, and one for each sampled block of a GPU.
//
// One clock for all: ranks of one host share its monotonic clock (a GPU's own is tied to it, see
// native/engine/stage_timer.h). A rank on another host is shifted so that its syncs end when rank 0's do, by the median:
// nobody leaves a sum before everybody has come.

import { type StagePlace, type StepTimes, spanAt } from './stages.js';
import { quantile } from './stats.js';

/** One rank's steps, by its own clock. */
export interface TracedRank {
  rank: number;
  host: string;
  steps: readonly StepTimes[];
}

export interface TraceEvent {
  name: string;
  ph: 'X' | 'M';
  pid: number; // the rank
  tid: number;
  ts?: number; // us
  dur?: number; // us
  args?: Record<string, unknown>;
}

const STAGES = 0;
const SYNCS = 1;
const BLOCKS = 2; // and the blocks behind it

/** The trace as an object to be written as JSON; times begin with the first step. */
export function chromeTrace(places: readonly StagePlace[], ranks: readonly TracedRank[]) {
  const shifts = ranks.map((rank) => (rank.host === ranks[0]!.host ? 0 : shiftOf(places, ranks[0]!, rank)));
  const zero = Math.min(...ranks.map(({ steps }, r) => steps[0]!.begin - shifts[r]!));
  const traceEvents = ranks.flatMap((rank, r) => [
    ...names(rank),
    ...rank.steps.flatMap((step, number) => stepEvents(places, rank.rank, step, number, zero + shifts[r]!)),
  ]);
  return { traceEvents, displayTimeUnit: 'ns' };
}

/** ns by which the clock of `other` is ahead. */
function shiftOf(places: readonly StagePlace[], first: TracedRank, other: TracedRank): number {
  const ends = ({ steps }: TracedRank) =>
    steps.flatMap(({ spans }) => places.flatMap(({ sync }, i) => (sync ? [spans[3 * i + 2]!] : [])));
  const own = ends(first);
  const apart = ends(other).map((end, i) => end - own[i]!);
  return quantile(
    apart.filter((ns) => !Number.isNaN(ns)),
    0.5,
  );
}

function names({ rank, host, steps }: TracedRank): TraceEvent[] {
  const named = (what: string, tid: number, name: string): TraceEvent => ({
    ...{ name: what, ph: 'M', pid: rank, tid },
    args: { name },
  });
  return [
    named('process_name', STAGES, `rank ${rank} on ${host}`),
    named('thread_name', STAGES, 'stages'),
    named('thread_name', SYNCS, 'syncs'),
    ...Array.from(steps[0]!.blocks, (block, b) => named('thread_name', BLOCKS + b, `block ${block}`)),
  ];
}

function stepEvents(
  places: readonly StagePlace[],
  pid: number,
  step: StepTimes,
  number: number,
  zero: number,
): TraceEvent[] {
  const event = (tid: number, name: string, from: number, to: number, args = {}): TraceEvent => ({
    ...{ name, ph: 'X', pid, tid, ts: from, dur: to - from },
    args,
  });
  const [begin, end] = [(step.begin - zero) / 1000, (step.end - zero) / 1000];
  const events = [event(STAGES, `step ${number}`, begin, end)];
  for (const [i, { name, kind, layer, sync }] of places.entries()) {
    const span = spanAt(step.spans, i, zero);
    if (!span) continue;
    const us = span.end - span.begin;
    const bytes = step.bytes[i]!;
    const args = { layer, kind, bytes, gb_per_s: bytes > 0 ? bytes / 1e3 / us : 0 };
    events.push(event(sync ? SYNCS : STAGES, name, span.begin, span.end, args));
    if (span.inputs > span.begin) events.push(event(STAGES, 'wait', span.begin, span.inputs));
    for (const b of step.blocks.keys()) {
      const own = spanAt(step.marks, b * places.length + i, zero);
      if (!own) continue;
      events.push(event(BLOCKS + b, name, own.begin, own.end, { layer, kind }));
      if (own.inputs > own.begin) events.push(event(BLOCKS + b, 'wait', own.begin, own.inputs));
    }
  }
  return events;
}
