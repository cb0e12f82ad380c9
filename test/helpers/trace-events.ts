// What must hold of every trace: events of a thread lie inside each other or apart.

import { expect } from 'vitest';
import type { TraceEvent } from '../../src/report/trace.js';

type Timed = TraceEvent & { ts: number; dur: number };

/** One ns, for the rounding of a double. */
const NS = 1e-3;

export const timedOf = (events: readonly TraceEvent[]) => events.filter(({ ph }) => ph === 'X') as Timed[];

export const inside = (inner: Timed, outer: Timed) =>
  inner.ts >= outer.ts - NS && inner.ts + inner.dur <= outer.ts + outer.dur + NS;

/** Every two events of a thread nest or do not touch. */
export function expectNesting(events: readonly TraceEvent[]): void {
  const nameOf = ({ pid, tid }: TraceEvent) => `${pid}/${tid}`;
  for (const thread of new Set(events.map(nameOf))) {
    const own = timedOf(events).filter((event) => nameOf(event) === thread);
    const open: Timed[] = [];
    for (const event of own.toSorted((a, b) => a.ts - b.ts || b.dur - a.dur)) {
      while (open.length > 0 && open.at(-1)!.ts + open.at(-1)!.dur <= event.ts + NS) open.pop();
      const outer = open.at(-1);
      if (outer) expect(inside(event, outer), `${event.name} in ${outer.name} on ${thread}`).toBe(true);
      open.push(event);
    }
  }
}
